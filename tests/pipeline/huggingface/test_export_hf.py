"""Export: what transformers loads is the model, what was imported comes back bit for bit, mistakes leave nothing."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from data.tokenizer.tokenizer import load_tokenizer  # noqa: E402
from launch.cli import USER_ERROR, main  # noqa: E402
from model.config import MemoryConfig  # noqa: E402
from pipeline.checkpoint.folder import CheckpointError, find_checkpoint  # noqa: E402
from pipeline.checkpoint.reader import CheckpointReader  # noqa: E402
from pipeline.huggingface.export_model import export_model  # noqa: E402
from pipeline.huggingface.import_model import import_model  # noqa: E402
from pipeline.inference.generate import Generator  # noqa: E402
from pipeline.inference.sampling import Sampling  # noqa: E402
from tests.tiny_hf import FAMILIES, write_hf_model  # noqa: E402
from tests.tiny_run import write_run  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("remote_modules", "topology")]

TEXT = "the cat sat on the mat and looked at the hat, "


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "run")


def exported(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def masters(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(find_checkpoint(folder))
    return {key: reader.whole_tensor(key) for key in reader.keys()}  # noqa: SIM118 (not a dict)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.mark.parametrize(
    "model",
    [
        {"rule": "none", "gate": "none", "tie_embeddings": False},
        {"rule": "linear", "gate": "sigmoid", "qkv_bias": True, "local_context": "sliding"},
        {"rule": "delta", "gate": "hard"},
        {"rule": "deltanet", "gate": "hard", "qk_norm": True},
        {"rule": "gated_deltanet", "gate": "sigmoid"},
        pytest.param({"rule": "kda", "gate": "sigmoid"}, marks=pytest.mark.slow),
        {"rule": "gdn2", "gate": "none"},
        {"rule": "delta", "gate": "hard", "layers": [1]},
    ],
    ids=lambda model: model["rule"],
)
@torch.no_grad()
def test_greedy_tokens_are_those_of_infini_generate(tmp_path, model):
    """Prompts of many segments, in a padded batch, and the full recomputation without a cache, in double precision."""
    run = write_run(tmp_path / "run", **model)
    prompts = [(TEXT * 3)[:101], TEXT, "the"]
    mine = Generator.open(run).generate(prompts, max_new_tokens=14)
    export_model(run, tmp_path / "hf")
    theirs, tokenizer = exported(tmp_path / "hf").double(), AutoTokenizer.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, padding_side="left", pad_token="<|endoftext|>"
    )  # fmt: skip
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    found = theirs.generate(**batch, max_new_tokens=14, eos_token_id=None)
    for prompt, completion, row in zip(prompts, mine, found, strict=True):
        tokens = torch.tensor([list(prompt.encode())])
        for _ in completion.tokens:
            logits = theirs(tokens, use_cache=False).logits[:, -1:]
            tokens = torch.cat([tokens, logits.argmax(dim=-1)], dim=1)
        recomputed = tokens[0, -len(completion.tokens) :].tolist()
        assert completion.tokens == recomputed
        assert row[batch.input_ids.shape[1] :][: len(recomputed)].tolist() == recomputed
    assert max(len(completion.tokens) for completion in mine) == 14


@torch.no_grad()
def test_the_same_model_from_many_files_and_from_one(run, tmp_path):
    one = export_model(run, tmp_path / "one")
    many = export_model(run, tmp_path / "many", shard_bytes=10_000)
    assert (one.shards, one.bytes, one.parameters) == (1, many.bytes, many.parameters)
    assert many.shards == len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert_same(tensors(tmp_path / "one"), tensors(tmp_path / "many"))
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == many.bytes == 4 * many.parameters
    tokens = torch.randint(0, 257, (1, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(exported(tmp_path / "one")(tokens).logits, exported(tmp_path / "many")(tokens).logits)
    again = tmp_path / "again"
    exported(tmp_path / "many").save_pretrained(again)
    assert torch.equal(exported(again)(tokens).logits, exported(tmp_path / "one")(tokens).logits)


def test_memory_parameters_stay_float32_in_a_bfloat16_model(run, tmp_path):
    export_model(run, tmp_path / "hf")
    model = exported(tmp_path / "hf", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".memory." in name else torch.bfloat16), name


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_plain_gives_back_what_was_imported(tmp_path, family):
    original = write_hf_model(tmp_path / "hf", family)
    memory = MemoryConfig(rule="delta", write_gate="hard")
    import_model(tmp_path / "hf", tmp_path / "ours", memory=memory, segment_length=24)
    found = export_model(tmp_path / "ours", tmp_path / "back", plain=True)
    assert "attention.beta" in found.notes[0] and "12 parameters" in found.notes[0]
    assert_same(tensors(tmp_path / "back"), tensors(tmp_path / "hf"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    tokens = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens).logits, original(tokens).logits)
    assert not list((tmp_path / "back").glob("*.py"))


SLIDING = {"use_sliding_window": True, "sliding_window": 30}


@pytest.mark.parametrize("by_way_of", ["import", "export"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 30}),
        ("qwen2", SLIDING | {"max_window_layers": 1}),
        ("qwen3", SLIDING | {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    ],
)
@torch.no_grad()
def test_plain_slides_as_the_imported_model_did(tmp_path, family, settings, by_way_of):
    """Also when the model went out with its memory and came back in between."""
    original = write_hf_model(tmp_path / "hf", family, **settings)
    ours = tmp_path / "ours"
    import_model(tmp_path / "hf", ours, memory=MemoryConfig(), segment_length=24)
    if by_way_of == "export":
        export_model(ours, tmp_path / "home")
        ours = tmp_path / "again"
        import_model(tmp_path / "home", ours, memory=None)
    export_model(ours, tmp_path / "back", plain=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    tokens = torch.randint(0, 300, (1, 90), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens).logits, original(tokens).logits)
    description = json.loads((tmp_path / "back" / "config.json").read_text())
    assert description["sliding_window"] == 30
    full = {"sliding_window": None}
    if family != "mistral":
        full |= {"use_sliding_window": False, "layer_types": ["full_attention"] * 4}
    (tmp_path / "back" / "config.json").write_text(json.dumps(description | full))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert not torch.equal(other(tokens).logits, original(tokens).logits)  # it matters


@pytest.mark.parametrize("name", ["layers.1.mlp.linear_fc1.weight", "layers.0.attention.beta"])
def test_weights_that_are_not_finite_do_not_go_out(tmp_path, name):
    run = write_run(tmp_path / "run", not_finite=name)
    with pytest.raises(CheckpointError, match=rf"step_00000000: {re.escape(name)} .* holds 2 of [\d,]+ numbers"):
        export_model(run, tmp_path / "hf")
    assert not list(tmp_path.glob("*hf*"))
    with pytest.raises(CheckpointError, match=rf"step_00000000 holds weights that are NaN .*: {re.escape(name)} \(2\)"):
        Generator.open(run)


def test_scores_that_are_not_finite_are_an_error(run, monkeypatch):
    """Not the token 0, not a choice among NaN."""
    generator = Generator.open(run)
    scores = generator.model.stage.next_token_logits
    calls = []

    def overflow(hidden):
        calls.append(1)
        return scores(hidden) * (float("inf") if len(calls) > 2 else 1.0)

    monkeypatch.setattr(generator.model.stage, "next_token_logits", overflow)
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        calls.clear()
        with pytest.raises(ValueError, match="prompt 1: the model's scores .* NaN or infinite after 2 new tokens"):
            generator.generate(["the cat"], sampling=sampling, max_new_tokens=5)


@pytest.mark.parametrize("rule", ["delta", "gated_deltanet"])
def test_an_older_export_does_not_speak_of_convolutions(tmp_path, rule):
    """Then `gated_deltanet` alone has them: for the exported code, and for the import."""
    run = write_run(tmp_path / "run", rule)
    export_model(run, tmp_path / "hf")
    tokens = torch.randint(0, 257, (1, 30), generator=torch.Generator().manual_seed(0))
    logits = exported(tmp_path / "hf")(tokens).logits
    description = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert description.pop("memory_short_convolution") == (rule == "gated_deltanet")
    assert description.pop("memory_convolution_width") == 4
    (tmp_path / "hf" / "config.json").write_text(json.dumps(description))
    assert torch.equal(exported(tmp_path / "hf")(tokens).logits, logits)
    import_model(tmp_path / "hf", tmp_path / "back", memory=None)
    assert masters(run).keys() == masters(tmp_path / "back").keys()


@pytest.mark.parametrize(
    ("rule", "layers", "width"),
    [("delta", None, 4), ("gated_deltanet", None, 4), ("gated_deltanet", [1], 7), ("kda", None, 4), ("gdn2", None, 4)],
)
def test_import_of_an_export_is_bit_equal(tmp_path, rule, layers, width):
    """Import, (training,) export, import: the memory's parameters included."""
    run = write_run(tmp_path / "run", rule, layers=layers, width=width, qk_norm=True, local_context="sliding")
    export_model(run, tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "back", memory=None)
    ours, back = masters(run), masters(tmp_path / "back")
    rows = "master/embedding.weight"
    assert torch.equal(ours[rows][:257], back[rows][:257])  # the rest is padding, of another multiple
    assert_same({**ours, rows: ours[rows][:257]}, {**back, rows: back[rows][:257]})
    export_model(tmp_path / "back", tmp_path / "again")
    names = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    with pytest.raises(ValueError, match=f"has a memory, {rule}"):
        import_model(tmp_path / "hf", tmp_path / "other", memory=MemoryConfig(rule="linear"))


def test_an_export_without_all_of_its_memory_is_not_imported(run, tmp_path):
    export_model(run, tmp_path / "hf", shard_bytes=1)
    index = tmp_path / "hf/model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.1.self_attn.memory.beta"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.self_attn\.memory\.beta"):
        import_model(tmp_path / "hf", tmp_path / "back", memory=None)


@torch.no_grad()
def test_tokenizers(tmp_path):
    """Bytes as a byte-level BPE; a chat template and special tokens beside the tokenizer are taken along."""
    run = write_run(tmp_path / "run")
    export_model(run, tmp_path / "bytes")
    text = "Hé\n\t \x00\x7f漢字 the  end"
    bytes_ = AutoTokenizer.from_pretrained(tmp_path / "bytes", trust_remote_code=True)
    assert bytes_(text).input_ids == list(text.encode()) and bytes_.decode(list(text.encode())) == text
    assert (bytes_.eos_token_id, len(bytes_)) == (256, 257)
    write_hf_model(tmp_path / "hf", "llama")
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ 'x' }}"}
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(config))
    import_model(tmp_path / "hf", tmp_path / "ours", memory=MemoryConfig(), segment_length=24)
    export_model(tmp_path / "ours", tmp_path / "out")
    bpe = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert bpe(TEXT).input_ids == load_tokenizer(tmp_path / "hf").encode(TEXT)
    assert bpe.chat_template == "{{ 'x' }}"
    model = exported(tmp_path / "out")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == bpe.eos_token_id


def test_what_cannot_be_exported_is_refused(run, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def refuse(message, source=run, error=ValueError, **options):
        with pytest.raises(error, match=message):
            export_model(source, out, **options)
        assert not out.exists() and not list(tmp_path.glob(".*"))

    refuse("no checkpoint here", source=tmp_path)
    refuse("holds no tokenizer", tokenizer=tmp_path)
    refuse("both", source=write_run(tmp_path / "both", qkv_bias=True, qk_norm=True), plain=True)
    beta = "layers.1.attention.beta"
    refuse(f"holds no {beta}", source=write_run(tmp_path / "beta", leave_out=[beta]), error=CheckpointError)
    fc1 = "layers.0.mlp.linear_fc1.weight"
    refuse(f"holds no {fc1}", source=write_run(tmp_path / "fc1", leave_out=[fc1]), error=CheckpointError)
    (tmp_path / "beta/tokenizer/info.json").unlink()
    moved = write_run(tmp_path / "moved")
    for path in (moved / "tokenizer").iterdir():
        path.unlink()
    (moved / "tokenizer").rmdir()
    refuse("--tokenizer", source=moved)
    damaged = write_run(tmp_path / "damaged")
    (file,) = (damaged / "checkpoints/step_00000000").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refuse(file.name, source=damaged, error=CheckpointError)
    file.write_bytes(content[:-1])
    refuse(file.name, source=damaged, error=CheckpointError)


def test_a_folder_with_something_in_it_is_left_alone(run, tmp_path):
    (tmp_path / ".hf.partial").mkdir()
    (tmp_path / ".hf.partial" / "notes.txt").write_text("mine")
    export_model(run, tmp_path / "hf")
    assert (tmp_path / ".hf.partial" / "notes.txt").read_text() == "mine"
    for name in ("hf", ".hf.partial"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        export_model(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_write_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("pipeline.checkpoint.tensor_file.TensorFile.write", full)
    with pytest.raises(OSError, match="No space"):
        export_model(run, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_one_tensor_at_a_time(run, tmp_path, monkeypatch):
    """No more than one parameter is read before it is written, and everything is read once."""
    read = []
    whole_tensor = CheckpointReader.whole_tensor
    monkeypatch.setattr(CheckpointReader, "whole_tensor", lambda self, key: read.append(key) or whole_tensor(self, key))
    written = []
    write = export_model.__globals__["TensorFile"].write

    def record(self, name, tensor):
        written.append((len(read), name))
        write(self, name, tensor)

    monkeypatch.setattr("pipeline.checkpoint.tensor_file.TensorFile.write", record)
    steps = []
    found = export_model(run, tmp_path / "hf", progress=steps.append)
    assert len(read) == len(set(read)) and [n for n, _ in written] == sorted(n for n, _ in written)
    assert {n for n, _ in written} == set(range(1, len(read) + 1))
    assert math.fsum(steps) >= found.parameters


def test_command_line(run, tmp_path, capsys):
    assert main(["export-hf", str(run), "--out", str(tmp_path / "hf"), "--max-shard-size", "0.01MB", "--plain"]) == 0
    said = capsys.readouterr().out
    assert "--plain leaves out the memory: 6 parameters" in said and f"from_pretrained('{tmp_path / 'hf'}')" in said
    assert all(path.stat().st_size < 30_000 for path in (tmp_path / "hf").glob("*.safetensors"))
    assert main(["export-hf", str(run), "--out", str(tmp_path / "hf")]) == USER_ERROR
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export-hf", str(run), "--out", str(tmp_path / "other"), "--max-shard-size", "5 lumps"])
    assert "is not a size such as 5GB" in capsys.readouterr().err
