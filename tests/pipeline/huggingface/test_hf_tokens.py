"""What a folder says of its tokens comes out of an import and an export as it went in; code of its own does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from tokenizers import Tokenizer as Backend  # noqa: E402
from tokenizers import processors  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from data.tokenizer.tokenizer import load_tokenizer  # noqa: E402
from model.config import MemoryConfig  # noqa: E402
from pipeline.huggingface.export_model import export_model  # noqa: E402
from pipeline.huggingface.import_model import import_model  # noqa: E402
from pipeline.huggingface.tokens import read_tokens  # noqa: E402
from pipeline.inference.generate import Generator  # noqa: E402
from tests.tiny_hf import write_hf_model  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("remote_modules", "topology")]

BEGIN, TURN = 280, 281
GENERATION = {"bos_token_id": BEGIN, "eos_token_id": [0, TURN], "pad_token_id": 0, "do_sample": True, "top_k": 7}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|eot|>{% endfor %}"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A model of chats as transformers saves it: a token that begins a text, two that end one, a template."""
    folder = tmp_path_factory.mktemp("hf") / "chat"
    write_hf_model(folder, "llama", bos_token_id=BEGIN, eos_token_id=[0, TURN])
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<|bos|>", "<|eot|>"])
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BEGIN)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|bos|>", eos_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture
def source(chat, tmp_path):
    return shutil.copytree(chat, tmp_path / "hf")


def change(path: Path, drop=(), **settings):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({name: x for name, x in content.items() if name not in drop} | settings))


def round_trip(source: Path, plain: bool) -> tuple[Path, list[str]]:
    """Import and export; the export, and all notes."""
    notes = import_model(source, source.parent / "ours", memory=MemoryConfig(), segment_length=24)
    export = export_model(source.parent / "ours", source.parent / "back", plain=plain)
    return source.parent / "back", [*notes, *export.notes]


def meaning(folder: Path) -> dict:
    """What transformers makes of a folder's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    generation = GenerationConfig.from_pretrained(folder)
    return {
        "ids": tokenizer("the cat<|eot|> sat").input_ids,
        "end": tokenizer.eos_token_id,
        "begin": tokenizer.bos_token_id,
        "templates": tokenizer.chat_template,
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False)
        if tokenizer.chat_template
        else None,
        "config": (config.bos_token_id, config.eos_token_id, config.pad_token_id),
        "generation": (generation.bos_token_id, generation.eos_token_id, generation.do_sample, generation.top_k),
    }


@pytest.mark.parametrize("plain", [False, True])
def test_tokens_and_templates_come_out_as_they_went_in(source, plain):
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("tool")
    wanted = meaning(source)
    assert wanted["begin"] == BEGIN and wanted["config"][1] == [0, TURN] and wanted["ids"][0] == BEGIN
    assert set(wanted["templates"]) == {"default", "tool"}
    back, _ = round_trip(source, plain)
    assert meaning(back) == wanted
    assert (back / "chat_template.jinja").read_bytes() == (source / "chat_template.jinja").read_bytes()
    assert json.loads((back / "generation_config.json").read_text()) == GENERATION


def test_a_template_in_the_settings_and_a_legacy_list_of_tokens(source):
    """As transformers 4 wrote them; the end token stands in special_tokens_map.json alone."""
    (source / "chat_template.jinja").unlink()
    change(source / "tokenizer_config.json", drop=("eos_token", "backend"), chat_template=TEMPLATE)
    change(source / "special_tokens_map.json", eos_token={"content": "<|eot|>", "lstrip": False, "normalized": False})
    wanted = meaning(source)
    assert wanted["end"] == TURN
    back, _ = round_trip(source, plain=False)
    assert meaning(back) == wanted
    assert load_tokenizer(source.parent / "ours").eos_id == TURN


def test_what_began_with_an_import_finds_its_templates_again(source, tmp_path):
    """The tokenizer of a trained run is its prepared set's, which knows nothing of templates."""
    import_model(source, tmp_path / "ours", memory=MemoryConfig(), segment_length=24)
    load_tokenizer(tmp_path / "ours").save(tmp_path / "set" / "tokenizer")
    trained = shutil.copytree(tmp_path / "ours", tmp_path / "trained")
    shutil.rmtree(trained / "tokenizer")
    export = export_model(trained, tmp_path / "back", tokenizer=tmp_path / "set")
    assert meaning(tmp_path / "back") == meaning(source)
    assert any("ours/tokenizer" in note for note in export.notes)
    shutil.rmtree(tmp_path / "ours")
    export = export_model(trained, tmp_path / "without", tokenizer=tmp_path / "set")
    assert any("train.init_from" in note and "left out" in note for note in export.notes)
    assert AutoTokenizer.from_pretrained(tmp_path / "without", trust_remote_code=True).eos_token_id == 0


def test_all_end_tokens_end_a_generated_text(source, tmp_path):
    import_model(source, tmp_path / "ours", memory=MemoryConfig(), segment_length=24)
    generator = Generator.open(tmp_path / "ours")
    for token, expected in {0: ("eos", "", 1), TURN: ("eos", "", 1), 5: ("length", "%%%", 3)}.items():
        scores = torch.zeros(1, 300).index_fill(1, torch.tensor([token]), 9.0)
        generator.model.stage.next_token_logits = lambda hidden, scores=scores: scores
        (found,) = generator.generate(["the cat"], max_new_tokens=3)
        assert (found.ended_by, found.text, len(found.tokens)) == expected


# Two files that differ


@pytest.mark.parametrize("decoder", [False, True], ids=["map counts", "settings count"])
def test_special_tokens_in_two_files(source, decoder):
    settings = {"eos_token": "<|endoftext|>"}
    if decoder:
        token = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
        settings["added_tokens_decoder"] = {str(TURN): {"content": "<|eot|>"} | token}
    change(source / "tokenizer_config.json", **settings)
    change(source / "special_tokens_map.json", eos_token="<|eot|>")
    expected = AutoTokenizer.from_pretrained(source).eos_token_id
    assert expected == (0 if decoder else TURN)
    tokens = read_tokens(source)
    carried = json.loads(tokens.files["tokenizer_config.json"])
    assert tokens.tokenizer.eos_id == expected
    assert carried["eos_token"] == ("<|eot|>" if expected == TURN else "<|endoftext|>")
    assert any("special_tokens_map.json" in n and "tokenizer_config.json" in n and "counts" in n for n in tokens.notes)


def test_end_tokens_that_differ_are_said(source):
    change(source / "config.json", eos_token_id=TURN)
    (note,) = [note for note in read_tokens(source).notes if "end token" in note]
    for part in ("'<|endoftext|>' (0)", f"config.json says {TURN}", f"generation_config.json says 0, {TURN}"):
        assert part in note


@pytest.mark.parametrize(
    ("config", "generation", "found"),
    [(TURN, None, TURN), (0, TURN, TURN), ([0, TURN], TURN, TURN), (None, None, 0)],
)
def test_a_tokenizer_that_names_no_end_token(source, config, generation, found):
    """The file that generation goes by, then config.json, then a well-known token; it is said which."""
    change(source / "tokenizer_config.json", drop=("eos_token",))
    change(source / "config.json", drop=("eos_token_id",))
    (source / "generation_config.json").unlink()
    if config is not None:
        change(source / "config.json", eos_token_id=config)
    if generation is not None:
        change(source / "generation_config.json", eos_token_id=generation)
    notes = import_model(source, source.parent / "ours", memory=MemoryConfig(), segment_length=24)
    assert load_tokenizer(source.parent / "ours").eos_id == found
    assert any("end token" in note and ("<|eot|>" if found else "<|endoftext|>") in note for note in notes)


REFUSED = {
    "several end tokens": (
        ("tokenizer_config.json", {"eos_token": None}),
        ["names no eos_token", "generation_config.json several", "0, 281"],
    ),
    "an end token that is none": (
        ("tokenizer_config.json", {"eos_token": "<no>"}),
        ["config.json: the end token '<no>'"],
    ),
    "a begin token that is none": (("tokenizer_config.json", {"bos_token": "<no>"}), ["bos_token is '<no>'"]),
    "another id": (
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "<|eot|>"}}}),
        ["tokenizer_config.json says that token '5' is '<|eot|>'", "token 281"],
    ),
    "a token beside": (("added_tokens.json", {"<new>": 282}), ["added_tokens.json", "nothing of it"]),
    "a choice of tokenizers": (
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}),
        ["fast_tokenizer_files"],
    ),
    "a list for an object": (("special_tokens_map.json", {"eos_token": ["x"]}), ["special_tokens_map.json: eos_token"]),
    "a token with more": (
        ("tokenizer_config.json", {"pad_token": {"content": "x", "__class__": "os.system"}}),
        ["tokenizer_config.json: pad_token", "unknown field"],
    ),
    "ids that are none": (
        ("generation_config.json", {"eos_token_id": [[1]]}),
        ["generation_config.json: eos_token_id"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_contradicts_itself_or_is_not_of_its_type(source, what):
    (file, settings), expected = REFUSED[what]
    change(source / file, **settings)
    with pytest.raises(ValueError) as caught:
        read_tokens(source)
    for part in expected:
        assert part in str(caught.value)


def test_special_tokens_that_are_no_tokens_are_left_out(source):
    change(source / "tokenizer_config.json", pad_token="<pad>", additional_special_tokens=["<|eot|>", "<x>", "<y>"])
    tokens = read_tokens(source)
    carried = json.loads(tokens.files["tokenizer_config.json"])
    assert "pad_token" not in carried and carried["additional_special_tokens"] == ["<|eot|>"]
    (note,) = [note for note in tokens.notes if "no such token" in note]
    assert "pad_token" in note and "2 of additional_special_tokens" in note


# Code of the source's


EVIL = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedTokenizerFast
Path({marker!r}).write_text("ran")

class Evil(PreTrainedTokenizerFast):
    pass

class EvilConfig(PretrainedConfig):
    pass
"""


@pytest.mark.parametrize("way", ["auto_map", "old auto_map", "class", "elsewhere"])
@pytest.mark.parametrize("plain", [False, True])
def test_code_of_a_source_does_not_travel(source, tmp_path, way, plain):
    """Loading our export as our documentation says, with `trust_remote_code`, runs nothing of the source's."""
    marker = tmp_path / "marker"
    (source / "evil.py").write_text(EVIL.format(marker=str(marker)))
    where = f"{source}--evil.Evil" if way == "elsewhere" else "evil.Evil"
    settings = {"auto_map": {"AutoTokenizer": [None, where]}}
    if way == "old auto_map":
        settings = {"auto_map": [None, where]}
    if way == "class":
        settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    change(source / "tokenizer_config.json", custom_setting="evil", **settings)
    AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    assert marker.read_text() == "ran"  # it would
    marker.unlink()
    change(source / "config.json", auto_map={"AutoConfig": "evil.EvilConfig"})
    back, notes = round_trip(source, plain)
    AutoTokenizer.from_pretrained(back, trust_remote_code=True)
    AutoConfig.from_pretrained(back, trust_remote_code=True)
    assert not marker.exists()
    assert not (back / "evil.py").exists()
    assert all(b"evil" not in path.read_bytes().lower() for path in back.rglob("*.json"))
    said = " ".join(notes)
    for part in ("evil.py", "config.json: auto_map", "'auto_map'", "'custom_setting'"):
        assert part in said


def test_code_beside_a_given_tokenizer_does_not_travel(source, tmp_path):
    """`export-hf --tokenizer DIR`, and imports of before, whose folder has the settings as they were."""
    import_model(source, tmp_path / "ours", memory=MemoryConfig(), segment_length=24)
    (source / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "marker")))
    settings = {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    change(source / "tokenizer_config.json", **settings)
    change(tmp_path / "ours/tokenizer/tokenizer_config.json", **settings)
    for name, place in (("given", source), ("own", None)):
        export = export_model(tmp_path / "ours", tmp_path / name, tokenizer=place)
        AutoTokenizer.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert any("'auto_map'" in note for note in export.notes)
    assert not (tmp_path / "marker").exists()


# The tokenizer is the one that the model was trained with


@pytest.mark.parametrize("plain", [False, True])
def test_another_tokenizer_in_an_export_is_not_imported(source, tmp_path, plain):
    back, _ = round_trip(source, plain)
    memory = MemoryConfig() if plain else None
    import_model(back, tmp_path / "again", memory=memory, segment_length=24)
    content = json.loads((back / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[100:102]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (back / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json: tokenizer_sha256 is .* another one than the model"):
        import_model(back, tmp_path / "other", memory=memory, segment_length=24)
    assert not (tmp_path / "other").exists()
