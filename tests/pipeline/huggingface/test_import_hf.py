"""Import: the checkpoint is the Hugging Face model; what cannot be imported is refused by name, and leaves nothing."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from model.config import MemoryConfig  # noqa: E402
from model.decoder import DecoderStage  # noqa: E402
from model.layers.decoder_layer import StageOptions  # noqa: E402
from pipeline.checkpoint.folder import CheckpointError, find_checkpoint  # noqa: E402
from pipeline.checkpoint.reader import CheckpointReader  # noqa: E402
from pipeline.checkpoint.tensor_file import TensorFile  # noqa: E402
from pipeline.config.load import load_config  # noqa: E402
from pipeline.huggingface.import_model import import_model  # noqa: E402
from pipeline.inference.streaming import open_checkpoint  # noqa: E402
from pipeline.reporting.inspect import read_contents  # noqa: E402
from tests.tiny_hf import FAMILIES, VOCAB, write_hf_model  # noqa: E402

LENGTH = 24
MEMORY = MemoryConfig(rule="delta", write_gate="hard", beta_init=-4.0)


@pytest.fixture(scope="module")
def llama(topology, tmp_path_factory):
    """A folder in several shards, and the model in it."""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    return folder, write_hf_model(folder, "llama", shard_size="40KB")


def imported(source, out, **options):
    notes = import_model(source, out, **{"memory": MEMORY, "segment_length": LENGTH} | options)
    return load_config(out / "config.yaml", []), notes


def first_segment_losses(config, topology, out, tokens):
    streamer, _ = open_checkpoint(config, topology, find_checkpoint(out))
    inputs, labels = tokens[:-1].view(1, 1, -1), tokens[1:].view(1, 1, -1)
    with torch.no_grad():
        output = streamer.stage(inputs, streamer.empty_memory(1), torch.ones(1, 1, dtype=torch.bool), labels)
    return output.token_loss.flatten()


@pytest.mark.parametrize("family", FAMILIES)
def test_first_segment_is_the_imported_model(topology, tmp_path, family):
    """Through the files, in float32; `tests.model.huggingface.test_hf_weights` has the same in float64."""
    model = write_hf_model(tmp_path / "hf", family, shard_size="40KB" if family == "qwen3" else "1GB")
    config, _ = imported(tmp_path / "hf", tmp_path / "out")
    tokens = torch.randint(0, VOCAB, (LENGTH + 1,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens[None, :-1]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    found = first_segment_losses(config, topology, tmp_path / "out", tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.3


def test_what_an_import_leaves_behind(llama, tmp_path):
    config, notes = imported(llama[0], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert config.train.init_from == str(tmp_path / "out")
    assert (config.model.memory.rule, config.model.memory.beta_init) == ("delta", -4.0)
    assert config.optimizer.beta_lr_scale > 10
    assert notes == ["the embedding has 20 rows more than the tokenizer tokens"]
    assert json.loads((tmp_path / "out/tokenizer/info.json").read_text())["vocab_size"] == 280
    contents = read_contents(find_checkpoint(tmp_path / "out"), verify=True)
    assert contents.damage == []
    assert contents.layers[2].gate == pytest.approx([1 / (1 + math.exp(4))] * 3)
    assert contents.layers[2].write_gate_bias == 2.0
    assert contents.summary.source.memory == "initial"


def test_weights_are_bit_for_bit_those_of_the_file(llama, tmp_path):
    imported(llama[0], tmp_path / "out")
    reader = CheckpointReader(find_checkpoint(tmp_path / "out"))
    state = llama[1].state_dict()
    assert torch.equal(reader.whole_tensor("master/embedding.weight")[:VOCAB], state["model.embed_tokens.weight"])
    assert not reader.whole_tensor("master/output.weight")[VOCAB:].any()
    up = reader.whole_tensor("master/layers.3.mlp.linear_fc1.weight")[48:]
    assert torch.equal(up, state["model.layers.3.mlp.up_proj.weight"])


def test_every_memory_parameter_of_a_rule_gets_its_initial_value(llama, tmp_path):
    imported(llama[0], tmp_path / "out", memory=MemoryConfig(rule="gated_deltanet", write_gate="sigmoid"))
    config = load_config(tmp_path / "out" / "config.yaml", ["train.seed=0"])
    reader = CheckpointReader(find_checkpoint(tmp_path / "out"))
    stage = DecoderStage(
        config.model, StageOptions(), vocab_size=VOCAB, first_layer=0, last_layer=4, tensor_rank=0, tensor_size=1
    )
    stage.initialize(config.train.seed)
    parameters = dict(stage.global_parameters())
    assert {f"master/{name}" for name in parameters} == set(reader.keys())
    own = [name for name in parameters if ".attention." in name and "qkv" not in name and "projection" not in name]
    assert len(own) > 4 * 4
    for name in own:
        assert torch.equal(reader.whole_tensor(f"master/{name}"), parameters[name]), name


def test_bfloat16_is_read_exactly(llama, tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(llama[0], source)
    for path in source.glob("*.safetensors"):
        save_file({name: x.bfloat16() for name, x in load_file(path).items()}, path, metadata={"format": "pt"})
    imported(source, tmp_path / "out")
    reader = CheckpointReader(find_checkpoint(tmp_path / "out"))
    wanted = llama[1].state_dict()["model.norm.weight"].bfloat16().float()
    assert torch.equal(reader.whole_tensor("master/final_norm.weight"), wanted)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        before = set(tensors)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        if added := set(tensors) - before:
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            index["weight_map"] |= dict.fromkeys(added, path.name)
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_short(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def add_tensor(tensors):
    if "model.norm.weight" in tensors:
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(32)


def change_shape(tensors):
    if "model.norm.weight" in tensors:
        tensors["model.norm.weight"] = torch.zeros(31)


def drop_layer(folder):
    change_config(folder, num_hidden_layers=5)


def big_tokenizer(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] += [{"id": i, "content": f"<{i}>", "special": True} | plain for i in range(280, 301)]
    path.write_text(json.dumps(content))


BROKEN = {
    "missing tensor": (drop_layer, ["missing: model.layers.4.input_layernorm.weight", "and 4 more"]),
    "extra tensor": (lambda f: change_tensors(f, add_tensor), ["not part of", "model.layers.0.self_attn.o_proj.bias"]),
    "shape": (lambda f: change_tensors(f, change_shape), ["model.norm.weight has shape [31]", "[32]"]),
    "architecture": (lambda f: change_config(f, model_type="gpt2"), ["'gpt2'", "llama, mistral, qwen2, qwen3"]),
    "rope": (
        lambda f: change_config(f, rope_parameters={"rope_type": "longrope", "long_factor": [1.0]}),
        ["'longrope'", "default, linear, llama3, yarn"],
    ),
    "rope setting": (
        lambda f: change_config(f, rope_parameters={"rope_type": "linear", "factor": 2.0, "extra": 1}),
        ["'linear' with extra"],
    ),
    "activation": (lambda f: change_config(f, hidden_act="gelu"), ["hidden_act is 'gelu'", "silu"]),
    "bias": (lambda f: change_config(f, attention_bias=True), ["attention_bias"]),
    "setting": (lambda f: change_config(f, rms_norm_eps=None), ["rms_norm_eps is missing"]),
    "quantised": (lambda f: change_config(f, quantization_config={"bits": 4}), ["quantised"]),
    "cut short": (cut_short, ["-00002-of-", "damaged or cut short"]),
    "file missing": (lambda f: sorted(f.glob("*.safetensors"))[0].unlink(), ["-00001-of-", "is missing"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json is missing"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["no tokenizer.json", "save_pretrained"]),
    "tokenizer size": (big_tokenizer, ["the tokenizer has 301 tokens", "embedding 300"]),
    "context": (lambda f: change_config(f, max_position_embeddings=16), ["24 tokens", "max_position_embeddings = 16"]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_imported_is_named_and_leaves_nothing(llama, tmp_path, what):
    source = tmp_path / "hf"
    shutil.copytree(llama[0], source)
    damage, expected = BROKEN[what]
    damage(source)
    with pytest.raises(ValueError) as caught:
        imported(source, tmp_path / "out")
    for part in expected:
        assert part in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_sliding_window_must_hold_a_segment(topology, tmp_path):
    write_hf_model(tmp_path / "hf", "mistral", sliding_window=LENGTH)
    imported(tmp_path / "hf", tmp_path / "out")
    with pytest.raises(ValueError, match=f"sliding_window = {LENGTH}.*not {LENGTH + 1}"):
        imported(tmp_path / "hf", tmp_path / "longer", segment_length=LENGTH + 1)


def test_an_existing_folder_is_left_alone(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ValueError, match="exists already"):
        imported(llama[0], tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_a_second_copy_of_the_tied_embedding_is_left_out(topology, tmp_path):
    write_hf_model(tmp_path / "hf", "llama-tied")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    _, notes = imported(tmp_path / "hf", tmp_path / "out")
    assert any("lm_head.weight" in note for note in notes)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(ValueError, match="another matrix"):
        imported(tmp_path / "hf", tmp_path / "other")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e300, torch.float64)])
def test_weights_that_are_not_finite_are_found(llama, tmp_path, value, dtype):
    source = tmp_path / "hf"
    shutil.copytree(llama[0], source)
    name = "model.layers.2.mlp.up_proj.weight"
    for path in source.glob("*.safetensors"):
        tensors = {key: x.to(dtype) for key, x in load_file(path).items()}
        if name in tensors:
            tensors[name][3, :2] = value
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"-of-0000\d\.safetensors: model\.layers\.2\.mlp\.up_proj\.weight holds 2 of 1,536"
    ):
        imported(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_folder_of_the_users_beside_the_new_one_stays(llama, tmp_path):
    mine = tmp_path / ".out.partial" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    imported(llama[0], tmp_path / "out")
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "out"]


def test_tokenizer_errors_name_the_users_folder(llama, tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(llama[0], source)
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"]["type"] = "Surprise"
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"the tokenizer in {source} is damaged"):
        imported(source, tmp_path / "out")


def test_tensor_file_is_what_safetensors_writes(tmp_path):
    tensors = {"a": torch.randn(3, 5), "empty": torch.zeros(0, 2), "b": torch.randn(7)}
    with open(tmp_path / "x.safetensors", "wb") as out:
        file = TensorFile(out, {name: tuple(x.shape) for name, x in tensors.items()})
        for name, x in tensors.items():
            file.write(name, x)
        facts = file.facts()
    assert facts["bytes"] == (tmp_path / "x.safetensors").stat().st_size
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], x) for name, x in tensors.items())


def test_weights_alone_cannot_be_resumed(llama, tmp_path):
    from pipeline.checkpoint.run_state import load_parts

    imported(llama[0], tmp_path / "out")
    with pytest.raises(CheckpointError, match="train.init_from"):
        load_parts(CheckpointReader(find_checkpoint(tmp_path / "out")), {})
