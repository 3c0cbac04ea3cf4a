"""A run that stops and goes on is the run that never stopped: bit for bit on its layout, and on any other."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from data.files import sealed
from tests.distributed import cases
from tests.prepared import write_set

pytestmark = pytest.mark.distributed

MODELS = {
    "delta": ["model.memory.write_gate=hard", "model.memory.write_gate_bias=0.5"],
    "gated_deltanet": [
        "model.memory.rule=gated_deltanet",
        "model.memory.write_gate=sigmoid",
        "model.memory.mix_gate=token",
    ],
    "sliding-convolution": [
        "model.memory.rule=delta",
        "model.local_context=sliding",
        "model.memory.short_convolution=true",
    ],
    "packed": [
        "data.packing=true",
        "model.memory.rule=gated_deltanet",
        "model.local_context=sliding",
    ],
    "gdn2": ["model.memory.rule=gdn2"],
    "kda": ["model.memory.rule=kda"],
    "transformer-xl": ["model.memory.rule=none", "model.local_context=sliding"],
}
LAYOUTS = {
    "1111": (1, 1, 1, 1),
    "2111": (2, 1, 1, 1),
    "1212": (1, 2, 1, 2),
    "1121": (1, 1, 2, 1),
    "1122": (1, 1, 2, 2),
    "1123": (1, 1, 2, 3),
    "1221": (1, 2, 2, 1),
    "2123": (2, 1, 2, 3),
    "1111-4": (1, 1, 1, 1, 4),
}
"""Tensor, pipeline, data, ZeRO stage; context."""
MORE_CONTEXT = {"1212-2": (1, 2, 1, 2, 2)}
SEGMENTS = 4
"""Of a window."""


class Runs:
    """Runs of 20 steps with a checkpoint in the middle, one per layout and model, made when first asked for."""

    def __init__(self, pools, folder: Path) -> None:
        self.pools, self.folder = pools, folder
        self.data = str(write_set(folder / "set", [37, 500, 130, 64, 250, 90, 17, 400]))
        self.known: dict[str, dict] = {}
        self.count = 0

    def run(self, layout: str, model: str = "delta", **options) -> list[dict]:
        tensor, pipeline, data, zero, context = (*(LAYOUTS | MORE_CONTEXT)[layout], 1)[:5]
        overrides = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.zero_stage={zero}"]
        overrides += [f"parallel.context={context}"] if context > 1 else []
        overrides += [*MODELS[model], f"bptt.chunks_per_window={2 if pipeline > 1 else 1}"]
        self.count += 1
        options = {"folder": str(self.folder / f"run{self.count}")} | options
        world = tensor * pipeline * data * context
        return self.pools.run(world, cases.train_steps, data=self.data, overrides=overrides, **options)

    def whole(self, layout: str, model: str = "delta") -> dict:
        name = f"{model}-{layout}"
        if name not in self.known:
            folder = self.folder / name
            ranks = self.run(layout, model, folder=str(folder), steps=20, save_at=10)
            checkpoint = folder / "checkpoints" / "step_00000010"
            self.known[name] = merged(ranks) | {"checkpoint": str(checkpoint)}
        return self.known[name]


def merged(ranks: list[dict]) -> dict:
    """Rank 0's result, with the batches of all lanes and context ranks."""
    batches: dict[int, list[dict[int, str]]] = {}
    for rank in ranks:
        for lane, steps in rank["batches"].items():
            known = batches.setdefault(lane, [{} for _ in steps])
            for whole, own in zip(known, steps, strict=True):
                assert all(whole.setdefault(segment, own[segment]) == own[segment] for segment in own)  # of all stages
    assert all(sorted(step) == list(range(SEGMENTS)) for steps in batches.values() for step in steps)
    return ranks[0] | {"batches": batches}


@pytest.fixture(scope="module")
def runs(pools, tmp_path_factory):
    return Runs(pools, tmp_path_factory.mktemp("resume"))


def assert_bitwise(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []


@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=pytest.mark.slow) if x == "1121" else x for x in LAYOUTS],  # as 1221, without stages
)
def test_same_layout_goes_on_bit_for_bit(runs, layout):
    """Losses, gradient norms, batches, weights, moments and memory of steps 11 to 20."""
    whole = runs.whole(layout)
    resumed = merged(runs.run(layout, steps=10, resume=whole["checkpoint"]))
    assert resumed["losses"] == whole["losses"][10:]
    assert resumed["norms"] == whole["norms"][10:]
    assert resumed["batches"] == {lane: hashes[10:] for lane, hashes in whole["batches"].items()}
    assert_bitwise(resumed["tensors"], whole["tensors"])


@pytest.mark.parametrize(
    ("model", "layout", "other"),
    [
        ("gated_deltanet", "2111", "1111"),
        ("sliding-convolution", "1111", "2111"),
        ("transformer-xl", "1212", "1111"),
        pytest.param("gdn2", "2111", "1111", marks=pytest.mark.slow),
        pytest.param("kda", "1111", "2111", marks=pytest.mark.slow),
    ],
)
def test_everything_a_layer_carries_goes_on_bit_for_bit(runs, model, layout, other):
    """The convolutions' last tokens and the previous segment are memory, too; read whole on another layout."""
    whole = runs.whole(layout, model)
    resumed = merged(runs.run(layout, model, steps=10, resume=whole["checkpoint"]))
    assert resumed["losses"] == whole["losses"][10:]
    assert_bitwise(resumed["tensors"], whole["tensors"])
    own, found = (merged(runs.run(x, model, steps=0, resume=whole["checkpoint"]))["tensors"] for x in (layout, other))
    carried = {name.rsplit("/", 1)[1] for name in own if name.startswith("memory/")}
    assert carried & {"tail", "local_key"}
    assert_bitwise(found, own)


@pytest.mark.parametrize("model", ["sliding-convolution", pytest.param("gated_deltanet", marks=pytest.mark.slow)])
def test_context_parallel_runs_go_on_with_any_number_of_ranks(runs, model):
    """20 steps on 4 context ranks; their steps 11 to 15 on one, and from there 16 to 20 on 2 ranks of 2 stages."""
    whole = runs.whole("1111-4", model)
    folder = runs.folder / f"context-{model}"
    middle = merged(runs.run("1111", model, folder=str(folder), steps=5, resume=whole["checkpoint"], save=True))
    assert middle["saved"][-1] == "step_00000015"
    last = merged(runs.run("1212-2", model, steps=5, resume=str(folder / "checkpoints" / "step_00000015")))
    for lane, hashes in whole["batches"].items():
        assert [*middle["batches"][lane], *last["batches"][lane]] == hashes[10:]
    assert [*middle["losses"], *last["losses"]] == pytest.approx(whole["losses"][10:], rel=1e-6)
    # The memory is written once, with what stands right before the next window's first token.
    own, found = (
        merged(runs.run(x, model, steps=0, resume=whole["checkpoint"]))["tensors"] for x in ("1111-4", "1111")
    )
    assert {name.rsplit("/", 1)[1] for name in own if name.startswith("memory/")} >= {"M", "tail"}
    assert_bitwise(found, own)


@pytest.mark.parametrize("layout", ["1212", pytest.param("1111", marks=pytest.mark.slow)])
def test_documents_that_share_segments_go_on_inside_of_them(runs, layout):
    """On two stages: 10 steps from the middle of a run on one process; the same batches, losses to float32 rounding."""
    whole = runs.whole("1111", "packed")
    resumed = merged(runs.run(layout, "packed", steps=10, resume=whole["checkpoint"]))
    assert resumed["batches"] == {lane: hashes[10:] for lane, hashes in whole["batches"].items()}
    assert resumed["losses"] == pytest.approx(whole["losses"][10:], rel=1e-6 if layout != "1111" else 0, abs=0)


def test_new_processes_go_on_bit_for_bit(runs):
    """Nothing that matters lives in the process: the ranks that saved are dead when others resume."""
    whole = runs.whole("1212")
    runs.pools.pools[2].close()
    resumed = merged(runs.run("1212", steps=10, resume=whole["checkpoint"]))
    assert resumed["losses"] == whole["losses"][10:]
    assert_bitwise(resumed["tensors"], whole["tensors"])


PAIRED = ("1111", "2111", "1212", "1123", "1221", "2123")


@pytest.mark.parametrize("readers", [2, pytest.param(len(PAIRED) - 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", PAIRED)
def test_every_layout_reads_what_another_wrote(runs, source, readers):
    """Without a step in between: weights, moments and memory bit for bit, whoever wrote and whoever reads. By default
    the two layouts behind the writer's read, so that each one reads of two."""
    checkpoint = runs.whole(source)["checkpoint"]
    own = merged(runs.run(source, steps=0, resume=checkpoint))["tensors"]
    assert len(own) > 30
    behind = PAIRED.index(source) + 1
    for target in [*PAIRED, *PAIRED][behind : behind + readers]:
        assert_bitwise(merged(runs.run(target, steps=0, resume=checkpoint))["tensors"], own)


QUICK = (("1111", "2123"), ("2111", "1212"), ("1212", "1123"), ("1123", "1221"), ("1221", "2111"), ("2123", "1122"))
ALL = [*QUICK, *(pair for pair in itertools.permutations(PAIRED, 2) if pair not in QUICK)]


@pytest.mark.parametrize(
    ("source", "target"), [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in ALL]
)
def test_another_layout_goes_on(runs, source, target):
    """The same batches; losses, all weights and all moments to 1e-6; each tensor to what Adam makes of rounding."""
    whole = runs.whole(source)
    resumed = merged(runs.run(target, steps=10, resume=whole["checkpoint"]))
    assert resumed["batches"] == {lane: hashes[10:] for lane, hashes in whole["batches"].items()}
    assert resumed["losses"] == pytest.approx(whole["losses"][10:], rel=1e-6)
    for name, expected in whole["tensors"].items():
        difference = ((resumed["tensors"][name] - expected).norm() / expected.norm()).item()
        assert difference <= 2e-5, f"{name} differs by {difference:.1e} of its norm"
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        names = [name for name in whole["tensors"] if name.startswith(f"{kind}/")]
        expected, found = (torch.cat([run["tensors"][name].flatten() for name in names]) for run in (whole, resumed))
        difference = ((found - expected).norm() / expected.norm()).item()
        assert difference <= 1e-6, f"{kind} as a whole differs by {difference:.1e}"


# When things go wrong


@pytest.fixture(scope="module")
def two_checkpoints(pools, tmp_path_factory):
    """A run on two pipeline stages with checkpoints of steps 1 and 2; never changed."""
    folder = tmp_path_factory.mktemp("two")
    data = str(write_set(folder / "set", [300, 500]))
    overrides = ["parallel.pipeline=2", "train.steps=5"]
    arguments = {"folder": str(folder / "run"), "data": data, "overrides": overrides}
    pools.run(2, cases.train_steps, **arguments, steps=2, save_at=1, save=True)
    return folder / "run", data


@pytest.fixture
def resume(pools, two_checkpoints, tmp_path):
    """A copy of the run to break, and a function that starts from it."""
    original, data = two_checkpoints
    run = tmp_path / "run"
    shutil.copytree(original, run)

    def resume(path: str, *overrides: str) -> list[dict]:
        arguments = {"folder": str(run), "data": data, "resume": path}
        settings = ["parallel.pipeline=2", "train.steps=5", *overrides]
        return pools.run(2, cases.try_to_resume, **arguments, overrides=settings)

    return run, resume


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def garble_summary(path: Path) -> None:
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"format_version": 99}))


@pytest.mark.parametrize(
    ("file", "harm", "reason"),
    [
        ("rank_00001.safetensors", truncate, "bytes; the checkpoint recorded"),
        ("rank_00000.safetensors", Path.unlink, "is missing"),
        ("rank_00001.safetensors", flip, "was changed after it was written"),
        ("rank_00000.json", flip, "rank_00000.json"),
        ("checkpoint.json", truncate, "checkpoint.json"),
        ("checkpoint.json", garble_summary, "format version 99; this program reads version 1"),
    ],
)
def test_damaged_checkpoint_is_refused_by_name_and_passed_over(resume, file, harm, reason):
    run, start = resume
    newest = run / "checkpoints" / "step_00000002"
    harm(newest / file)
    for rank in start(str(newest)):
        kind, message = rank["error"]
        assert kind == "CheckpointError"
        assert str(newest / file) in message and reason in message
    ranks = start("latest")
    assert [(rank["error"], rank["step"]) for rank in ranks] == [(None, 1)] * 2
    printed = "".join(ranks[0]["printed"].split())  # the console breaks lines
    assert "DAMAGEDCHECKPOINT" in printed and "step_00000002" in printed


def test_latest_pointing_nowhere(resume):
    run, start = resume
    (run / "checkpoints" / "latest").write_text("step_00000007\n")
    for rank in start(str(run)):
        assert rank["error"][0] == "CheckpointError"
        assert "latest names step_00000007, which is not a checkpoint" in rank["error"][1]
    assert [rank["step"] for rank in start("latest")] == [2, 2]


@pytest.mark.parametrize("content", ["\x1b[2Jnonsense\n", "../../run/checkpoints/step_00000001\n", "x" * 5000])
def test_latest_that_holds_something_else_is_told(resume, content):
    run, start = resume
    pointer = run / "checkpoints" / "latest"
    pointer.write_text(content)
    ranks = start("latest")
    assert [(rank["error"], rank["step"]) for rank in ranks] == [(None, 2)] * 2
    printed = "".join(ranks[0]["printed"].split())
    assert str(pointer) in printed and f"goingonfrom{pointer.parent}/step_00000002" in printed
    assert "\x1b" not in printed and len(printed) < 6000


def test_data_of_another_tokenizer_is_refused(resume):
    run, start = resume
    path = run / "checkpoints" / "step_00000002" / "checkpoint.json"
    content = json.loads(path.read_text())
    assert content["tokenizer_sha256"]
    path.write_text(json.dumps(sealed(content | {"tokenizer_sha256": "0" * 64})))
    for resumed in ("latest", str(run)):
        for rank in start(resumed):
            kind, message = rank["error"]
            assert kind == "ConfigError" and str(path.parent) in message and "(000000000000)" in message


def test_no_checkpoint_at_all(resume):
    run, start = resume
    shutil.rmtree(run / "checkpoints")
    for rank in start(str(run)):
        assert rank["error"] == (
            "CheckpointError",
            f"{run}: no checkpoint here (no checkpoint.json, no latest)",
        )


def test_checkpoint_of_another_run_is_refused_by_key(resume):
    run, start = resume
    changed = ["train.lanes=8", "model.ffn_hidden_size=64", "model.memory.rule=linear", "data.stagger=false"]
    changed += ["model.memory.short_convolution=true", "model.memory.convolution_width=8"]
    for rank in start(str(run), *changed, "optimizer.lr=1e-4", "train.steps=9"):
        kind, message = rank["error"]
        assert kind == "ConfigError"
        for text in (
            "train.lanes is 8, but the checkpoint was written with 4",
            "model.ffn_hidden_size is 64, but the checkpoint was written with 48",
            "model.memory.rule is 'linear', but the checkpoint was written with 'delta'",
            "model.memory.convolution_width is 8, but the checkpoint was written with 4",
            "data.stagger is False",
        ):
            assert text in message
        assert "optimizer" not in message and "train.steps" not in message


@pytest.mark.parametrize(
    ("where", "rank", "asynchronous"),
    [
        *(("tensors", 1, "true"), ("tensors", 1, "false"), ("fsync", 0, "true"), ("fsync", 1, "false")),
        pytest.param("fsync", 0, "false", marks=pytest.mark.slow),
        pytest.param("fsync", 1, "true", marks=pytest.mark.slow),
    ],
)
def test_full_disk_leaves_nothing_that_looks_complete(pools, two_checkpoints, tmp_path, where, rank, asynchronous):
    overrides = ["train.steps=3", "optimizer.warmup_steps=1", "checkpoint.interval=1", "checkpoint.attempts=2"]
    overrides += [f"checkpoint.asynchronous={asynchronous}"]
    arguments = {"folder": str(tmp_path / "run"), "data": two_checkpoints[1], "overrides": overrides}
    ranks = pools.run(2, cases.train_on_full_disk, **arguments, where=where, rank=rank, failures=99)
    reason = "File too large" if where == "tensors" else "No space left on device"
    assert ranks[0]["error"] == ranks[1]["error"]
    assert f"rank {rank} could not write the checkpoint" in ranks[0]["error"] and reason in ranks[0]["error"]
    assert ranks[0]["left"] == []


def test_full_disk_that_gets_room_again_costs_one_checkpoint(pools, two_checkpoints, tmp_path):
    overrides = ["train.steps=3", "optimizer.warmup_steps=1", "checkpoint.interval=1", "checkpoint.attempts=2"]
    arguments = {"folder": str(tmp_path / "run"), "data": two_checkpoints[1], "overrides": overrides}
    ranks = pools.run(2, cases.train_on_full_disk, **arguments, where="tensors", rank=1, failures=1)
    assert [(rank["error"], rank["step"]) for rank in ranks] == [(None, 3)] * 2
    # Which of the later steps got one depends on how soon the failure was seen.
    assert {"latest", "step_00000003"} <= set(ranks[0]["left"]) <= {"latest", "step_00000002", "step_00000003"}
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000003\n"
