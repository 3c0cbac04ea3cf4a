"""Generation with real ranks: against a full recomputation, alone and in a batch, on layouts, and from memory files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.distributed import cases, generation_cases
from tests.distributed.generation_cases import texts
from tests.prepared import write_set

pytestmark = pytest.mark.distributed

MODEL = ["train.steps=4", "model.memory.beta_init=2.0", "model.init_std=0.2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(write_set(tmp_path_factory.mktemp("data") / "set", [300, 90, 41, 200, 150, 129, 17, 260]))


def trained(pools, folder: Path, data: str, *overrides: str) -> str:
    pools.run(1, cases.train_steps, folder=str(folder), data=data, overrides=[*MODEL, *overrides], steps=2, save=True)
    return str(folder)


@pytest.fixture(scope="module")
def run(pools, tmp_path_factory, data) -> str:
    return trained(pools, tmp_path_factory.mktemp("run") / "run", data, "model.memory.write_gate=hard")


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_greedy_tokens_are_those_of_a_full_recomputation(pools, run, precision):
    overrides = [f"train.precision={precision}"]
    result = pools.run(1, generation_cases.greedy_and_recomputed, run=run, overrides=overrides, new_tokens=40)[0]
    assert result["margin"] > 1e-4  # no tie that rounding could turn
    assert result["found"] == result["recorded"] == result["expected"]
    assert len({tuple(tokens) for tokens in result["found"]}) == 5
    assert min(len(set(tokens)) for tokens in result["found"]) > 3


@pytest.mark.parametrize(
    "settings",
    [
        ["model.memory.rule=none"],
        ["model.memory.rule=deltanet"],
        ["model.memory.rule=gated_deltanet", "model.memory.mix_gate=token"],
        pytest.param(["model.memory.rule=kda", "model.memory.write_gate=sigmoid"], marks=pytest.mark.slow),
        pytest.param(["model.memory.rule=gdn2", "model.memory.write_gate=hard"], marks=pytest.mark.slow),
        ["model.memory.rule=none", "model.local_context=sliding"],
        ["model.memory.rule=delta", "model.local_context=sliding"],
        ["model.memory.layers=[1]", "model.memory.write_gate=hard"],
    ],
    ids=lambda settings: "-".join(setting.partition("=")[2] for setting in settings),
)
def test_other_memories_recompute_alike_and_can_be_kept(pools, tmp_path, data, settings):
    run = trained(pools, tmp_path / "run", data, *settings)
    result = pools.run(1, generation_cases.greedy_and_recomputed, run=run, overrides=[], new_tokens=20)[0]
    assert result["margin"] > 1e-4
    assert result["found"] == result["recorded"] == result["expected"]
    path = str(tmp_path / "memory")
    pools.run(1, generation_cases.save_document, run=run, overrides=[], path=path, document=[texts()[3]])
    found = pools.run(1, generation_cases.ask, run=run, overrides=[], path=path, questions=["question"])[0]
    assert found == pools.run(1, generation_cases.whole, run=run, prompts=[texts()[3] + "question"])[0]


@pytest.fixture(scope="module")
def single(pools, run) -> dict:
    return pools.run(1, generation_cases.completions, run=run, overrides=[])[0]


def test_a_prompt_does_not_depend_on_the_batch(pools, run, single):
    assert pools.run(1, generation_cases.alone, run=run)[0] == single["drawn"]
    assert single["drawn"] != single["greedy"]


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_the_layout_does_not_change_the_tokens(pools, run, single, layout):
    results = pools.run(2, generation_cases.completions, run=run, overrides=[layout])
    assert results[0] == results[1] == single


def test_a_kept_document_answers_questions_on_any_layout(pools, tmp_path, run):
    document, questions = texts()[4][:100], ["xyz", "a longer question, past the segment", "q"]
    expected = pools.run(1, generation_cases.whole, run=run, prompts=[document + q for q in questions])[0]
    for world, layout in ((1, "parallel.tensor=1"), (2, "parallel.tensor=2"), (2, "parallel.pipeline=2")):
        path = str(tmp_path / f"{layout}.memory")
        read = pools.run(
            world, generation_cases.save_document, run=run, overrides=[layout], path=path, document=[document]
        )
        assert read == [[100]] * world
        for other, other_layout in ((1, "parallel.tensor=1"), (2, "parallel.tensor=2")):
            found = pools.run(
                other, generation_cases.ask, run=run, overrides=[other_layout], path=path, questions=questions
            )
            assert found == [expected] * other
    assert not list(tmp_path.glob(".*"))


def test_many_kept_documents_go_on_each_for_itself(pools, tmp_path, run):
    path, questions = str(tmp_path / "memory"), ["one", "another", "x", "yy", "zzz"]
    arguments = {"run": run, "overrides": [], "path": path}
    pools.run(1, generation_cases.save_document, **arguments, document=texts())
    found = pools.run(1, generation_cases.ask, **arguments, questions=questions)[0]
    prompts = [text + question for text, question in zip(texts(), questions, strict=True)]
    assert found == pools.run(1, generation_cases.whole, run=run, prompts=prompts)[0]
    function = {"case": generation_cases.ask, **arguments, "questions": ["two", "prompts"]}
    assert "5 documents and there are 2 prompts" in pools.run(1, generation_cases.refusal, **function)[0]


def test_a_memory_of_another_model_is_refused(pools, tmp_path, data, run):
    path = tmp_path / "memory"
    pools.run(1, generation_cases.save_document, run=run, overrides=[], path=str(path), document=["text"])

    def refusal(run: str, path: Path) -> str:
        arguments = {"run": run, "overrides": [], "path": str(path), "questions": ["q"]}
        return pools.run(1, generation_cases.refusal, case=generation_cases.ask, **arguments)[0]

    ungated = trained(pools, tmp_path / "ungated", data)
    message = refusal(ungated, path)
    assert "another model: model.memory.write_gate is 'hard' there and 'none' here" in message and str(path) in message
    twin = trained(pools, tmp_path / "twin", data, "model.memory.write_gate=hard", "train.seed=4")
    assert "of the same shape, but with other weights" in refusal(twin, path)

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    other = tmp_path / "other"
    save_file(load_file(path), other, metadata=header | {"tokenizer": '"0"'})
    assert "another tokenizer" in refusal(run, other)
    save_file({"x": torch.zeros(1)}, other)
    assert "not a memory file" in refusal(run, other)
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    other.write_bytes(content)
    assert f"{other} was changed after it was written" in refusal(run, other)
    (tmp_path / "any").touch()
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode  # by the umask
    other.write_bytes(path.read_bytes()[:-40])
    assert "damaged" in refusal(run, other)
    assert "no memory file" in refusal(run, tmp_path / "missing")


def test_a_text_ends_at_a_stop_string_an_end_token_or_its_length(pools, run):
    result = pools.run(1, generation_cases.ended, run=run)[0]
    free, stopped, at_eos = result["free"], result["stopped"], result["at_eos"]
    assert free.ended_by == "length" and len(free.tokens) == 12
    assert "".join(result["pieces"]) == free.text and len(result["pieces"]) > 1
    assert stopped.ended_by == "stop" and stopped.text == free.text[: free.text.index(result["stop"])]
    assert at_eos.ended_by == "eos"
    assert at_eos.tokens == free.tokens[: free.tokens.index(free.tokens[5]) + 1]


def test_a_file_is_read_in_blocks_of_any_size(pools, tmp_path, run):
    path = tmp_path / "prompt.txt"
    path.write_bytes(("é\r\n" + texts()[4]).encode())
    for block in (1, 7, 1000):
        blockwise, whole = pools.run(1, generation_cases.from_file, run=run, path=str(path), block=block)[0]
        assert blockwise == whole
    path.write_bytes(b"ab\xff")
    arguments = {"run": run, "path": str(path), "block": 7}
    message = pools.run(1, generation_cases.refusal, case=generation_cases.from_file, **arguments)[0]
    assert str(path) in message and "not UTF-8" in message


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.memory.skip_empty=false"], "settings under model belong to the checkpoint"),
        (["parallel.tensor=2"], "on 1 process(es): their number must be a multiple of 2"),
        (["parallel.sequence_parallel=true"], "leave it out"),
    ],
)
def test_settings_that_do_not_fit_are_refused(pools, run, overrides, message):
    arguments = {"run": run, "overrides": overrides}
    assert message in pools.run(1, generation_cases.refusal, case=generation_cases.completions, **arguments)[0]


def test_an_empty_prompt_is_refused(pools, run):
    arguments = {"run": run, "prompts": ["text", ""]}
    message = pools.run(1, generation_cases.refusal, case=generation_cases.whole, **arguments)[0]
    assert "prompt 2 is empty" in message
