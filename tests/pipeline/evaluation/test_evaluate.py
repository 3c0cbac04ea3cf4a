"""Evaluation without processes: documents, windows, intervals, passkey scores, and what the command line accepts."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.prepared.shards import PreparedSet
from data.synthetic import FILLER, PasskeyGenerator
from data.tokenizer.tokenizer import byte_tokenizer, train_bpe
from launch import cli
from launch.commands import evaluate
from model.config import MemoryConfig, ModelConfig
from model.rules.state import LocalContext, MatrixState, choose_lanes, join_state, roll_lanes
from pipeline.config.evaluation import evaluation_config
from pipeline.config.load import ConfigError, load_config
from pipeline.config.task_spec import Task
from pipeline.config.validate import validate
from pipeline.evaluation import answers, report
from pipeline.evaluation.comparison import compare, loss_difference, run_names
from pipeline.evaluation.evaluate import _check_model
from pipeline.evaluation.heldout import choose_documents, each_document, summarize
from pipeline.evaluation.intervals import ratio_intervals, resample_counts, wilson_interval
from pipeline.evaluation.passkey import (
    FIRST_SEED,
    PLACES,
    Row,
    common_beginning,
    document_seed,
    grid_wanted,
    passkey_cells,
    passkey_document,
    passkey_results,
    shortest_length,
)
from pipeline.evaluation.task_report import capacity_marks
from pipeline.evaluation.tasks import task_cells, task_results
from pipeline.inference.streaming import Output, Streamer, array_document, window
from tests.data.test_stores import upload
from tests.prepared import write_set

CPU = torch.device("cpu")
BYTES = byte_tokenizer()


# Intervals


def test_bootstrap_interval_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = ratio_intervals(values, np.ones(400), resample_counts(400, seed=1))
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.03)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_bootstrap_weights_tokens_and_keeps_documents_whole():
    # Every document has the same loss per token: whatever is drawn, the mean is the same.
    weight = np.array([[10.0, 0.0], [1000.0, 5.0], [3.0, 0.0]])
    low, high = ratio_intervals(2.5 * weight, weight, resample_counts(3, seed=0))
    assert low[0] == pytest.approx(2.5) and high[0] == pytest.approx(2.5)
    assert math.isnan(low[1])  # one document says nothing about others
    # Two documents: half of the resamples hold both, a quarter each only one of them.
    low, high = ratio_intervals(np.array([1.0, 3.0]), np.ones(2), resample_counts(2, seed=0))
    assert (low, high) == (1.0, 3.0)


def test_bootstrap_is_seeded():
    assert (resample_counts(5, seed=3) == resample_counts(5, seed=3)).all()
    assert (resample_counts(5, seed=3) != resample_counts(5, seed=4)).any()
    assert (resample_counts(5, seed=3).sum(axis=1) == 5).all()


@pytest.mark.parametrize(
    "successes, trials, expected",  # Newcombe 1998, table I, method 3
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (29, 29, (0.8830, 1.0))],
)
def test_wilson_interval(successes, trials, expected):
    assert wilson_interval(successes, trials) == pytest.approx(expected, abs=1e-4)


# Documents and windows


def test_window_is_the_document_with_labels_answers_and_padding():
    documents = [array_document("a", np.arange(12), [(8, 10)]), array_document("b", np.arange(100, 104))]
    first = window(documents, 0, 2, 4, 999, CPU)
    assert first.tokens.tolist() == [
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[100, 101, 102, 999], [999] * 4],
    ]
    assert first.labels[0].flatten().tolist() == list(range(1, 9))
    assert first.loss_weight.sum(dim=2).tolist() == [[4, 4], [3, 0]]
    assert first.answer_mask.nonzero().tolist() == [[0, 1, 3]]  # label 8
    assert first.reset.tolist() == [[True, False]] * 2
    assert first.padded_tokens == 5
    last = window(documents, 2, 1, 4, 999, CPU)
    assert last.tokens[0].tolist() == [[8, 9, 10, 999]] and last.labels[0].tolist() == [[9, 10, 11, 999]]
    assert last.answer_mask.nonzero().tolist() == [[0, 0, 0]]  # label 9
    assert not last.reset.any() and last.position_in_document[0].tolist() == [8]


def test_long_documents_come_first_in_a_drawn_order(tmp_path):
    source = PreparedSet(write_set(tmp_path / "set", [30, 500, 81, 200, 82, 300, 50]), "valid")

    def chosen(documents: int, seed: int) -> list[int]:
        found = choose_documents(source, documents=documents, max_segments=5, segment_length=16, seed=seed)
        for document in found:
            assert len(document.read(0, document.length)) == document.length
        return [document.length for document in found]

    assert chosen(5, 0) == [81] * 5
    assert chosen(7, 0) == [81] * 5 + [50, 30]
    orders = {
        tuple(d.name for d in choose_documents(source, documents=5, max_segments=5, segment_length=16, seed=seed))
        for seed in range(5)
    }
    assert len(orders) > 1


def test_pieces_of_a_source_that_are_a_token_longer_do_not_come_first(tmp_path):
    source = PreparedSet(write_set(tmp_path / "set", [80] * 8 + [79] * 8), "valid")
    found = choose_documents(source, documents=8, max_segments=5, segment_length=16, seed=0)
    assert {document.length for document in found} == {79, 80}


@pytest.mark.parametrize("number, limit", [(4, 3), (64, 64), (65, 64), (7, 3), (2, 64), (130, 64)])
def test_batches_are_even_and_leave_nobody_alone(number, limit):
    batches = Streamer.batches(SimpleNamespace(max_lanes=limit), list(range(number)))
    assert sum(batches, []) == list(range(number))
    assert all(2 <= len(batch) <= limit for batch in batches)


def test_exchanged_memory_leaves_the_local_context():
    lanes = torch.arange(3.0)
    context = LocalContext(*(lanes.view(shape) for shape in ((3, 1, 1, 1), (3, 1, 1, 1), (3, 1, 1))))
    memory = [join_state(MatrixState(lanes.view(3, 1, 1, 1)), context), context, None]
    first, second, third = roll_lanes(memory, with_context=False)
    assert first.M.flatten().tolist() == [1, 2, 0]
    assert all(torch.equal(x, y) for found in (first[1:], second) for x, y in zip(found, context, strict=True))
    assert third is None


def test_memory_of_other_lanes():
    memory = [MatrixState(torch.arange(3.0).view(3, 1, 1, 1)), None]
    assert roll_lanes(memory, with_context=False)[0].M.flatten().tolist() == [1, 2, 0]
    zeros = [MatrixState(torch.zeros(3, 1, 1, 1)), None]
    chosen = choose_lanes(torch.tensor([True, False, True]), memory, zeros)
    assert chosen[0].M.flatten().tolist() == [0, 0, 2] and chosen[1] is None


def test_summary_pairs_the_controls():
    weight = np.array([[4.0, 4.0], [4.0, 0.0], [4.0, 2.0]])
    on = np.array([[8.0, 4.0], [40.0, 0.0], [4.0, 2.0]])
    facts = summarize({"weight": weight, "on": on, "off": on + 0.5 * weight}, seed=0)
    assert facts["ways"]["on"]["loss"] == pytest.approx(58 / 18)
    assert facts["ways"]["on"]["by_segment"] == pytest.approx([52 / 12, 1.0])
    assert facts["by_segment_documents"] == [3, 2] and facts["by_segment_tokens"] == [12, 6]
    # Documents differ by nats, the control by exactly half a nat everywhere.
    low, high = facts["ways"]["off"]["loss_interval"]
    assert high - low > 1
    assert facts["above_on"]["off"]["loss"] == pytest.approx(0.5)
    assert facts["above_on"]["off"]["loss_interval"] == pytest.approx([0.5, 0.5])


# Passkey


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([BYTES.decode(PasskeyGenerator(BYTES).document(4000, 0.3, 1).tokens)], 300)


@pytest.mark.parametrize("segments, length, depth", [(9, 64, 0.0), (16, 64, 0.5), (31, 64, 1.0), (5, 128, 0.31)])
def test_passkey_documents_fill_their_segments(bpe, segments, length, depth):
    for tokenizer in (BYTES, bpe):
        document = passkey_document(PasskeyGenerator(tokenizer), segments, length, depth, seed=7)
        tokens = document.read(0, document.length)
        assert document.length == segments * length + 1 == len(tokens)
        ((start, stop),) = document.answers
        text, answer = tokenizer.decode(tokens), tokenizer.decode(tokens[start:stop]).strip()
        assert stop == document.length and re.fullmatch(r"\d{5}", answer)
        assert text.startswith("There is an important info") and f"The pass key is {answer}. Remember it." in text
        assert text.endswith(f"again. What is the pass key? The pass key is {answer}") or depth == 1.0
        # Up to the needle it is what all documents begin with, and the needle's digits come at once.
        beginning = common_beginning(PasskeyGenerator(tokenizer), segments * length + 1)
        shared = document.shared
        assert (tokens[:shared] == beginning.read(0, shared)).all()
        assert tokenizer.decode(tokens[shared:]).startswith(f" The pass key is {answer}. Remember it.")
        for first in (0, 3, shared - 2, stop - 9):
            assert (document.read(first, first + 9) == tokens[first : first + 9]).all()


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_passkey_needles_lie_anywhere_in_their_segments(depth):
    segments, places = 128, []
    for number in range(60):
        document = passkey_document(
            PasskeyGenerator(BYTES), segments, 64, depth, document_seed(1, segments, depth, number)
        )
        text = BYTES.decode(document.read(0, document.length))
        places.append(text.index(" The pass key is"))
        assert abs(text[: places[-1]].count(FILLER) - depth * text.count(FILLER)) <= PLACES + 2
        assert (text.index(" is the pass key.") + 16) // 64 < text.index(" What is the pass key?") // 64
    assert len(set(places)) == PLACES
    assert max(places) - min(places) == (PLACES - 1) * len(FILLER)


def test_a_document_of_ten_million_tokens_is_not_held():
    generator = PasskeyGenerator(BYTES)
    document = passkey_document(generator, 163_840, 64, 0.5, 3)
    assert document.length == 10 * 1024**2 + 1
    assert BYTES.decode(document.read(document.length - 23, document.length - 5)) == "? The pass key is "
    assert BYTES.decode(document.read(document.shared, document.shared + 16)) == " The pass key is"


def test_passkey_seeds_are_nobody_elses():
    seeds = {document_seed(1, length, depth, i) for length in (2, 4) for depth in (0.0, 0.5) for i in range(50)}
    assert len(seeds) == 200 and min(seeds) >= FIRST_SEED
    assert document_seed(1, 2, 0.5, 3) == document_seed(1, 2, 0.5, 3) != document_seed(2, 2, 0.5, 3)


class Oracle:
    """Remembers the text so far, and answers with the first key in it; without memory, with the key in the segment."""

    has_memory = True
    local_reach = 0
    segment_length = 64
    capacity = 64 * 16

    def __init__(self, lanes: int = 64, step: int = 16, rank: int = 0, ranks: int = 1) -> None:
        self.max_lanes, self.step = lanes, step
        self.topology = SimpleNamespace(data_rank=rank, data_size=ranks)
        self.reads: list[tuple[int, int]] = []  # (lanes, segments)
        self.answered: list[str] = []

    def segments_per_window(self, lanes):
        return self.step

    def window(self, documents, first, segments, eos_id):
        return window(documents, first, segments, self.segment_length, eos_id, CPU)

    def empty_memory(self, lanes):
        return [MatrixState(torch.full((lanes, 1, self.capacity, 1), 256.0)), None]

    def add_up(self, sums):
        return sums

    def read(self, batch, memory, *, memory_off=False):
        self.reads.append(tuple(batch.tokens.shape[:2]))
        return self._run(batch, memory).memory

    def run(self, batch, memory, *, memory_off=False, correct=False):
        output = self._run(batch, memory, memory_off)
        if not memory_off:
            self.answered += [self._text(row) for row in output.memory[0].M.flatten(1).long().tolist()]
        return output

    def _text(self, tokens):
        return BYTES.decode([t for t in tokens if t != 256])

    def _run(self, batch, memory, memory_off=False):
        seen = memory[0].M.flatten(1).long().tolist()
        correct = torch.zeros_like(batch.answer_mask)
        carried = []
        for lane, tokens in enumerate(batch.tokens.flatten(1).tolist()):
            before = [t for t in seen[lane] if t != 256]
            text = BYTES.decode(tokens if memory_off else [*before, *tokens])
            key = re.search(r"The pass key is (\d{5})\. Remember", text)
            spots = batch.answer_mask[lane].flatten().nonzero().flatten()
            for spot, digit in zip(spots.tolist(), key[1] if key else "", strict=False):
                correct[lane].view(-1)[spot] = int(batch.labels[lane].flatten()[spot]) == ord(digit)
            carried.append((before + tokens + [256] * self.capacity)[: self.capacity])
        state = MatrixState(torch.tensor(carried, dtype=torch.float32).view(-1, 1, self.capacity, 1))
        return Output(None, correct, [state, None])


def _rows(lengths=(6, 12), depths=(0.0, 0.4), documents=4, seeds=(3,)) -> list[Row]:
    return [Row(segments, tuple(depths), documents, tuple(seeds)) for segments in lengths]


def _grid(oracle: Oracle, rows: list[Row]) -> tuple[dict, list[np.ndarray], answers.Plan, int]:
    done = []
    work = answers.plan(oracle, passkey_cells(rows, BYTES, oracle.segment_length))
    counts = answers.measure(oracle, work, BYTES.eos_id, done.append)
    return passkey_results(rows, counts, oracle.segment_length, seed=3), counts, work, sum(done)


@pytest.mark.parametrize("lanes, step", [(64, 16), (3, 1), (4, 2)])
def test_passkey_grid_tells_what_the_memory_does(lanes, step):
    oracle = Oracle(lanes, step)
    grid, _, work, done = _grid(oracle, _rows())
    assert done == work.tokens < (6 + 12) * 64 * 2 * 4  # not counting twice what is shared
    assert len(grid["cells"]) == 2 * 2 * 3
    for cell in grid["cells"]:
        on = cell["control"] == "on"
        assert cell["documents"] == 4
        assert cell["exact_match"] == (1.0 if on else 0.0), cell
        # Two pairs of documents change their keys: with this seed half of the digits agree in one cell.
        assert cell["token_accuracy"] == 1.0 if on else cell["token_accuracy"] <= 0.5
        assert cell["exact_match_interval"] == pytest.approx([0.5101, 1.0] if on else [0.0, 0.4899], abs=1e-3)
    (pooled,) = (x for x in grid["by_length"] if (x["segments"], x["control"]) == (12, "on"))
    assert pooled["documents"] == 8 and pooled["exact_match_interval"] == pytest.approx([0.6756, 1.0], abs=1e-3)
    assert max(segments for _, segments in oracle.reads) <= step


def test_sharing_the_beginning_does_not_change_what_a_document_reads():
    rows = _rows(lengths=(8, 14), depths=(0.0, 0.5, 1.0), documents=5, seeds=(3, 4))
    cells = passkey_cells(rows, BYTES, 64)
    oracle = Oracle(lanes=4)
    answers.measure(oracle, answers.plan(oracle, cells), BYTES.eos_id, lambda tokens: None)
    documents = [cell.make(number) for cell in cells for number in range(cell.documents)]
    texts = [BYTES.decode(document.read(0, document.length - 1)) for document in documents]
    assert len(set(texts)) == len(texts) == 60
    # Each read with its own memory, once; and with that of another document.
    assert all(oracle.answered.count(text) == 1 for text in texts)
    assert len(oracle.answered) == 120
    assert (1, 14) not in oracle.reads and any(lanes == 1 for lanes, _ in oracle.reads)


def test_ranks_share_the_work():
    rows = _rows(lengths=(6, 14), depths=(0.0, 0.5, 1.0), documents=7)
    whole, alone, *_ = _grid(Oracle(), rows)
    counts, tokens = zip(*(_grid(Oracle(rank=rank, ranks=3), rows)[1::2] for rank in range(3)), strict=True)
    for cell, parts in zip(alone, zip(*counts, strict=True), strict=True):
        np.testing.assert_array_equal(np.sum(parts, axis=0), cell)
        assert sum((part[0].any(axis=1)).astype(int) for part in parts).tolist() == [1] * 7
    assert max(tokens) < 1.3 * min(tokens)


def test_passkey_grid_sees_a_key_in_the_last_segment_without_memory():
    class Near(Oracle):
        segment_length = 256

    grid, *_ = _grid(Near(), _rows(lengths=[2], depths=[1.0]))
    assert {cell["control"]: cell["exact_match"] for cell in grid["cells"]}["off"] == 1.0


def test_passkey_grid_without_somebody_to_exchange_with():
    grid, *_ = _grid(Oracle(), _rows(depths=[0.4], documents=1))
    assert {cell["control"] for cell in grid["cells"]} == set(grid["controls"]) == {"on", "off"}
    plain = Oracle()
    plain.has_memory = False
    assert _grid(plain, _rows())[0]["controls"] == ["on"]


def test_answers_of_one_document_are_scored_one_by_one():
    documents = [array_document("a", np.arange(9), [(2, 4), (6, 8)]), array_document("b", np.arange(9), [(5, 8)])]
    correct = torch.zeros(2, 1, 8, dtype=torch.bool)
    correct[0, 0, [1, 2, 5]] = True  # labels 2, 3 and 6
    correct[1, 0, [4, 5, 6]] = True
    batch = window(documents, 0, 1, 8, 0, CPU)
    counts = answers.count_right(batch, Output(None, correct, []), documents, 0)
    assert counts.tolist() == [[3, 4, 1, 2], [3, 3, 1, 1]]
    scores = answers.score(counts, seed=0)
    assert scores["exact_match"] == pytest.approx(2 / 3) and scores["token_accuracy"] == pytest.approx(6 / 7)
    assert scores["exact_match_interval"] == [0.5, 1.0]
    assert answers.score(np.zeros((2, 4)), seed=0) is None


def test_a_task_has_a_cell_for_every_setting():
    task = Task.parse("passkey:5,length=1K/2K,depth=0/1,keys=2")
    assert task.swept == ["length", "depth"] and task.documents == 5
    cells = task_cells(task, BYTES, 64, seed=1)
    assert [cell.segments for cell in cells] == [16, 16, 32, 32]
    for cell, settings in zip(cells, task.settings, strict=True):
        for number in range(5):
            document = cell.make(number)
            assert settings["length"] - 100 < document.length <= settings["length"]
            text = BYTES.decode(document.read(0, document.length))
            word = re.search(r"What is the pass key of (\w+)\?", text)[1]
            names = re.findall(r"The pass key of (\w+) is \d", text)
            assert len(names) == 3 and names[-1] == word  # two keys and the question
            assert names.index(word) == settings["depth"]  # the other stands between
    # A cell's documents are those of a spec of its own.
    alone = task_cells(Task.parse("passkey:9,length=2K,depth=1,keys=2"), BYTES, 64, seed=1)[0].make(3)
    assert (alone.read(0, 99_999) == cells[3].make(3).read(0, 99_999)).all()
    other = task_cells(task, BYTES, 64, seed=2)[3].make(3)
    assert other.read(0, other.length).tolist() != alone.read(0, alone.length).tolist()


def test_a_task_is_measured_with_its_controls():
    oracle = Oracle()
    (cell,) = task_cells(Task.parse("passkey:6,length=512"), BYTES, 64, seed=1)
    counts = answers.measure(oracle, answers.plan(oracle, [cell]), BYTES.eos_id, lambda tokens: None)
    found = task_results(Task.parse("passkey:6,length=512"), counts, seed=1)
    assert {cell["control"]: cell["exact_match"] for cell in found["cells"]} == {"on": 1.0, "off": 0.0, "shuffled": 0.0}


@pytest.mark.parametrize(
    "spec, message",
    [
        ("passkey:5,length=1K..2K", "'1K..2K' is not a size"),
        ("passkey:5,length=1K,depth=2", "depths lie in 0..1"),
        ("passkey:5,length=1K,seed=3", "the seed is evaluate.seed"),
        ("passkeys:5,length=1K", "no synthetic task 'passkeys'"),
        ("recall:5,length=1K,keys=3", "unknown option 'keys'"),
    ],
)
def test_specs_that_cannot_be_evaluated(spec, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_and_validate(f"evaluate.tasks=['{spec}']")
    assert "evaluate.tasks.0" in str(error.value)


def load_and_validate(override: str) -> None:
    validate(load_config(None, [override]), data_exists=False)


def test_a_task_that_does_not_fit_its_length_is_refused_at_once():
    with pytest.raises(ValueError, match="recall:5,length=64/1K,pairs=40.*at least"):
        task_cells(Task.parse("recall:5,length=64/1K,pairs=40"), BYTES, 64, seed=1)


def test_shortest_passkey_document():
    shortest = shortest_length(BYTES, 64)
    generator = PasskeyGenerator(BYTES)
    passkey_document(generator, shortest, 64, 0.5, 0)
    with pytest.raises(ValueError, match="has at least"):
        passkey_document(generator, shortest - 1, 64, 0.5, 0)


# Results


def test_json_without_nan():
    value = {"a": [1.0, float("nan"), (float("inf"), 2)], "b": {"c": -math.inf, "d": "text", "e": None, "f": True}}
    cleaned = report.without_nan(value)
    assert cleaned == {"a": [1.0, None, [None, 2]], "b": {"c": None, "d": "text", "e": None, "f": True}}
    json.dumps(cleaned, allow_nan=False)


def _results(run: str, losses: list[float], exact: float) -> dict:
    sums = {"weight": np.full((3, 4), 8.0), "on": 8.0 * np.tile(np.array(losses)[:, None], 4)}
    each = each_document(sums, [f"d{i}" for i in range(len(losses))])
    scores = {"segments": 4, "control": "on", "exact_match": exact}
    return {
        "run": run,
        "name": "same",
        "step": 7,
        "training_tokens": 1000,
        "seed": 1,
        "config": {"model": asdict(ModelConfig(segment_length=64))},
        "perplexity": {"text": report.without_nan(summarize(sums, 1) | {"each_document": each})},
        "passkey": {"rows": [{"segments": 4}], "controls": ["on"], "by_length": [scores]},
        "tasks": {"recall:9,length=1K,pairs=2/4": _recall(exact)},
    }


def _recall(exact: float) -> dict:
    """A task's results in which four pairs are half as often known as two."""
    task = Task.parse("recall:9,length=1K,pairs=2/4")
    counts = np.zeros((2, 3, 8, 4))
    for cell, share in enumerate((exact, exact / 2)):
        counts[cell, 0] = [[2 * (i < 8 * share), 2, i < 8 * share, 1] for i in range(8)]
    return task_results(task, counts, seed=0)


def test_runs_side_by_side(tmp_path, capsys):
    runs = [_results("a", [1.0, 2.0, 6.0], 0.25), _results("b", [0.9, 1.9, 5.9], 0.75)]
    assert run_names(runs) == ["a", "b"]
    content = compare(runs, tmp_path)
    difference = content["loss_above_first"]["text"]["b"]
    assert difference["loss"] == pytest.approx(-0.1)
    assert difference["loss_interval"] == pytest.approx([-0.1, -0.1])
    assert difference["by_segment"] == pytest.approx([-0.1] * 4)
    assert (difference["later"], difference["later_interval"]) == (
        pytest.approx(-0.1),
        pytest.approx([-0.1, -0.1]),
    )
    assert (tmp_path / "comparison_loss_above_first_text.png").exists()
    assert json.loads((tmp_path / "comparison.json").read_text()) == content
    assert (tmp_path / "comparison_loss_text.png").exists()
    printed = capsys.readouterr().out
    assert re.search(r"text: loss, memory on +3\.0000 +2\.9000", printed)
    assert re.search(r"text: loss above a \(95 %\) +-0\.1000", printed)
    assert re.search(r"text: loss above a, later half of the segments \(95 %\) +-0\.1000", printed)
    assert re.search(r"passkey 4 segments, memory on +0\.25 +0\.75", printed)
    assert re.search(r"recall length 1024, pairs 4, memory on +0\.12 +0\.38", printed)
    assert (tmp_path / "comparison_task_recall_9_length_1K_pairs_2_4.png").exists()


def test_many_runs_have_several_tables(tmp_path, capsys):
    compare([_results(name, [1.0, 2.0, 6.0], 0.0) for name in "abcdef"], tmp_path)
    tables = re.findall(r"^ +(a +.*)$", capsys.readouterr().out, re.MULTILINE)
    assert [table.split() for table in tables] == [["a", "b", "c"], ["a", "d", "e"], ["a", "f"]]


def test_the_later_half_counts_tokens_not_documents():
    """A document that ends early has no part in it; a longer last segment has its weight."""
    weight = np.array([[8.0, 8, 8, 8], [8, 8, 2, 0], [8, 0, 0, 0]])
    facts = []
    for later in (0.0, 1.0):
        sums = {"weight": weight, "on": weight * np.array([2.0, 2.0, 2.0 + later, 2.0 + 3 * later])}
        each = each_document(sums, ["a", "b", "c"])
        facts.append(report.without_nan(summarize(sums, 1) | {"each_document": each}))
    difference = loss_difference(*facts, seed=0)
    assert difference["later"] == pytest.approx((10 * 1 + 8 * 3) / 18)
    assert difference["loss"] == pytest.approx((10 * 1 + 8 * 3) / 58)
    assert difference["by_segment"] == pytest.approx([0, 0, 1, 3])
    low, high = difference["later_interval"]
    assert 1 <= low < difference["later"] < high <= 3


def test_segments_of_another_length_are_compared_by_document():
    """The same tokens, cut differently: their sum counts, no segment stands beside another."""
    facts = []
    for weight, losses in (
        ([[8.0, 8, 8, 8], [8, 8, 2, 0]], [[2.0, 2, 2, 2], [3, 3, 3, 0]]),
        ([[12.0, 12, 8], [12, 6, 0]], [[2.0, 1, 1], [4, 3, 0]]),
    ):
        sums = {"weight": np.array(weight), "on": np.array(weight) * np.array(losses)}
        each = each_document(sums, ["a", "b"])
        facts.append(report.without_nan(summarize(sums, 1) | {"each_document": each}))
    difference = loss_difference(*facts, seed=0)
    assert difference["loss"] == pytest.approx((-20 + 12) / 50)
    assert list(difference) == ["loss", "loss_interval"]
    low, high = difference["loss_interval"]
    assert low == pytest.approx(-20 / 32) and high == pytest.approx(12 / 18)


def test_what_a_matrix_can_hold_is_marked():
    model = asdict(ModelConfig(hidden_size=128, num_attention_heads=4, num_query_groups=2))
    assert list(capacity_marks(model, "pairs")) == [32, 64]  # a head's keys have 32 dimensions; two heads write
    assert capacity_marks(model, "length") == {}
    assert capacity_marks(asdict(ModelConfig(memory=MemoryConfig(rule="none"))), "pairs") == {}


def test_other_texts_are_not_compared():
    first, other = (_results(name, [1.0, 2.0, 6.0], 0.0)["perplexity"]["text"] for name in "ab")
    other["each_document"][0]["name"] = "another"
    assert loss_difference(first, other, 0) is None


def test_the_passkey_grid_is_for_those_who_trained_it_or_ask(tmp_path):
    """Twelve rows of 0.000 said nothing about a model of books."""
    books = write_set(tmp_path / "books", [300])
    plain = [f"data.sets=[{{path: {books}}}]"]
    wanted, note = grid_wanted(load_config(None, plain), ["evaluate.documents=3"], False)
    assert not wanted and str(books) in note and "--passkey asks for it" in note
    assert grid_wanted(load_config(None, plain), [], True) == (True, "")
    assert grid_wanted(load_config(None, plain), ["evaluate.passkey_documents=20"], False) == (True, "")
    assert grid_wanted(load_config(None, [*plain, "evaluate.passkey_lengths=[2]"]), [], False) == (True, "")
    wanted, note = grid_wanted(load_config(None, ["data.sets=[{path: gone}]"]), [], False)
    assert not wanted and note.startswith("no set of data.sets is there to tell")
    with pytest.raises(ConfigError, match="--passkey asks for a grid, but"):
        grid_wanted(load_config(None, [*plain, "evaluate.passkey_lengths=[]"]), [], True)

    passkeys = write_set(tmp_path / "passkeys", [300], source="passkey:5,length=1K")
    for place in (passkeys, upload(passkeys, "memory://bucket/passkeys")):
        both = [f"data.sets=[{{path: {books}}}, {{path: '{place}'}}]"]
        assert grid_wanted(load_config(None, both), [], False) == (True, "")


# Command line


def _parsed(*arguments: str) -> argparse.Namespace:
    args = cli.parse(["evaluate", *arguments])
    evaluate._sort_arguments(args)
    return args


def test_how_a_model_was_computed_is_no_other_model():
    """A run with `model.compile` or a kernel by name could not be evaluated: an evaluation has its own."""
    reader = SimpleNamespace(
        config=load_config(None, ["model.compile=true", "model.memory.kernel=torch", "model.backend=te"]), folder="run"
    )
    _check_model(reader, load_config(None, []))
    with pytest.raises(ConfigError, match="model.memory.epsilon is 0.1, but run was trained with 1e-06"):
        _check_model(reader, load_config(None, ["model.memory.epsilon=0.1"]))


def test_runs_and_settings_in_any_order():
    args = _parsed("a", "b", "evaluate.seed=3", "--nproc", "2", "parallel.tensor=2", "--documents", "5")
    assert args.run_dirs == ["a", "b"]
    assert args.overrides == ["evaluate.seed=3", "parallel.tensor=2", "evaluate.documents=5"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evaluate.seed=3"], "no run folder"),
        (["a", "b", "--checkpoint", "c"], "one run"),
        (["a", "--all-checkpoints", "--checkpoint", "b"], "--all-checkpoints is for one run"),
        (["a", "--no-passkey", "--no-perplexity"], "nothing to evaluate"),
        (["a", "--no-passkey", "--passkey"], "contradict"),
    ],
)
def test_command_lines_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        _parsed(*arguments)


def test_the_layout_is_the_evaluations_own(tmp_path):
    (tmp_path / "config.yaml").write_text("parallel: {tensor: 2, pipeline: 2, zero_stage: 2}\ntrain: {lanes: 6}\n")
    config = evaluation_config(tmp_path, [], 1)
    assert (config.parallel.tensor, config.parallel.pipeline) == (1, 1)
    assert evaluation_config(tmp_path, ["parallel.tensor=2"], 2).parallel.tensor == 2
    assert evaluation_config(tmp_path, ["parallel.tensor=2"], 4).train.lanes == 6  # of 5 copies of the model, too
    evaluation_config(tmp_path, [], 5)
    with pytest.raises(ConfigError, match="multiple of 2, such as --nproc 2"):
        evaluation_config(tmp_path, ["parallel.tensor=2"], 3)
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        evaluation_config(tmp_path / "nowhere", [], 1)
