"""GGUF files: the model and its tokenizer come out of them, and a header is not believed."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the extra `hf` is not installed")
pytest.importorskip("gguf", reason="the extra `hf` is not installed")

from data.files import FileError  # noqa: E402
from data.tokenizer.tokenizer import load_tokenizer  # noqa: E402
from model.config import MemoryConfig  # noqa: E402
from pipeline.huggingface.folder_source import open_source  # noqa: E402
from pipeline.huggingface.gguf_header import read_header  # noqa: E402
from pipeline.huggingface.import_model import import_model  # noqa: E402
from tests.tiny_gguf import header, setting, text, write_gguf  # noqa: E402
from tests.tiny_hf import write_hf_model  # noqa: E402

UINT8, UINT32, TEXT, ARRAY = 0, 4, 8, 9


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "llama"
    return folder, write_hf_model(folder, "llama-tied")


@pytest.fixture(scope="module")
def model(hf, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return path, write_gguf(path, hf[1], hf[0] / "tokenizer.json")


def test_tensors_and_settings(hf, model):
    """Rows permuted as llama.cpp's converter does it, settings in metadata, no output matrix: tied."""
    path, state = model
    source = open_source(path)
    assert source.shapes.keys() == state.keys() and source.notes == []
    for name, x in state.items():
        assert torch.equal(source.read(name), torch.from_numpy(x)), name
    wanted = json.loads((hf[0] / "config.json").read_text())
    for name in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "vocab_size", "tie_word_embeddings"):
        assert source.config[name] == wanted[name], name


def test_import_with_its_tokenizer(hf, model, tmp_path, topology):
    """A stranger's files beside it are not looked at."""
    path = tmp_path / "model.gguf"
    os.link(model[0], path)
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "evil.Evil"]}}')
    (tmp_path / "config.json").write_text("[")
    import_model(path, tmp_path / "out", memory=MemoryConfig(), segment_length=24)
    ours, theirs = load_tokenizer(tmp_path / "out"), load_tokenizer(hf[0])
    assert ours.eos_id == theirs.eos_id
    assert ours.encode("the cat sat on the hat") == theirs.encode("the cat sat on the hat")


def test_quantised_numbers_are_turned_back_and_said(hf, tmp_path):
    state = write_gguf(tmp_path / "model.gguf", hf[1], hf[0] / "tokenizer.json", kind="Q8_0")
    source = open_source(tmp_path / "model.gguf")
    (note,) = source.notes
    assert "tensors are quantised" in note and "as Q8_0" in note
    name = "model.layers.1.self_attn.o_proj.weight"
    np.testing.assert_allclose(source.read(name).numpy(), state[name], atol=2e-2 * np.abs(state[name]).max())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"llama.expert_count": 8}, "8 experts"),
        ({"llama.attention.key_length": 0}, "model.gguf: head_dim: Expected int >= 1"),
        ({"tokenizer.ggml.bos_token_id": 4000}, "its tokenizer cannot be read"),
    ],
)
def test_settings_that_this_decoder_does_not_have(hf, tmp_path, settings, reason):
    write_gguf(tmp_path / "model.gguf", hf[1], hf[0] / "tokenizer.json", settings=settings)
    with pytest.raises(ValueError, match=reason) as caught:
        open_source(tmp_path / "model.gguf").tokens()
    assert str(tmp_path / "model.gguf") in str(caught.value) and "infini-gguf" not in str(caught.value)


def test_every_cut_is_an_error_that_names_the_file(model, tmp_path):
    whole = model[0].read_bytes()
    ends = [*range(0, 64), *range(64, len(whole), 997), len(whole) - 33]
    for end in ends:
        (tmp_path / "short.gguf").write_bytes(whole[:end])
        with pytest.raises(FileError, match=r"short\.gguf"):
            read_header(tmp_path / "short.gguf")


def tensor(name="token_embd.weight", dims=(32, 4), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


HOSTILE = {
    "no magic": (b"GGML" + bytes(40), "does not begin with GGUF"),
    "other byte order": (header(say={"version": 0x03000000}), "of version 50331648"),
    "settings": (header(say={"settings": 2**60}), "its number of settings is"),
    "tensors": (header(say={"tensors": 2**60}), "its number of tensors is"),
    "a long name": (header(struct.pack("<Q", 2**62)), "a setting's name has"),
    "a long text": (header(setting("k", TEXT, struct.pack("<Q", 2**40))), "setting 'k' has 1,099,511,627,776 bytes"),
    "an array of bytes": (header(setting("k", ARRAY, array(UINT8, 2**61))), "'k' says that it has"),
    "an array of texts": (header(setting("k", ARRAY, array(TEXT, 2**40))), "'k' says that it has"),
    "a long array": (header(setting("k", ARRAY, array(UINT8, 5 << 20, bytes(5 << 20)))), "at most 4,194,304"),
    "many arrays": (
        header(*(setting(f"k{i}", ARRAY, array(UINT8, 1 << 20, bytes(1 << 20))) for i in range(5))),
        "'k4' says that it has",
    ),
    "arrays in arrays": (header(setting("k", ARRAY, array(ARRAY, 1) * 9)), "list of the type 9"),
    "an unknown type": (header(setting("k", 77, b"")), "unknown type 77"),
    "a key twice": (header(*[setting("k", UINT32, bytes(4))] * 2), "'k' stands twice"),
    "not a text": (header(text("a")[:8] + b"\xff"), "not text in UTF-8"),
    "alignment": (header(setting("general.alignment", UINT32, bytes(4))), "general.alignment = 0"),
    "dimensions": (header(tensors=(tensor(dims=(2,) * 5),)), "5 dimensions"),
    "a huge tensor": (header(tensors=(tensor(dims=(2**40, 2**40)),)), "numbers; valid are 1 to"),
    "a size that overflows": (header(tensors=(tensor(dims=(2**32, 2**32)),)), "numbers; valid are 1 to"),
    "an empty tensor": (header(tensors=(tensor(dims=(0,)),)), "0 numbers"),
    "an unknown kind": (header(tensors=(tensor(kind=99),)), "unknown type 99"),
    "rows that are no blocks": (header(tensors=(tensor(dims=(33,), kind=8),)), "rows of 33 numbers; Q8_0 needs 32"),
    "past the end": (header(tensors=(tensor(offset=2**63),)), "ends past"),
    "a tensor twice": (header(tensors=(tensor(),) * 2) + bytes(2000), "stands twice"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_counts_are_held_against_the_file(tmp_path, what):
    contents, reason = HOSTILE[what]
    (tmp_path / "model.gguf").write_bytes(contents + bytes(24))
    with pytest.raises(FileError, match=reason) as caught:
        read_header(tmp_path / "model.gguf")
    assert str(tmp_path / "model.gguf") in str(caught.value)


def test_kinds_that_cannot_be_turned_into_floats_are_named_before_anything_is_written(tmp_path):
    architecture = setting("general.architecture", TEXT, text("llama"))
    whole_numbers = 26
    (tmp_path / "model.gguf").write_bytes(header(architecture, tensors=(tensor(kind=whole_numbers),)) + bytes(4000))
    with pytest.raises(ValueError, match=r"model\.gguf: 'token_embd\.weight' is stored as I32"):
        open_source(tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_file(tmp_path, kind):
    path = tmp_path / "model.gguf"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(ValueError, match=r"model\.gguf"):
        open_source(path)
