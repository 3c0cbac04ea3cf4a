"""What a search gives is the best of all layouts, and each is what `infini plan` says of it."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import pytest

from pipeline.accounting import search as searching
from pipeline.accounting.footprint import per_rank_bytes
from pipeline.accounting.planner import Rates, predict_step
from pipeline.accounting.search import NoLayoutError, quick_step_s, search
from pipeline.config.load import ConfigError, load_config
from pipeline.config.schema import RECOMPUTE, ParallelConfig
from pipeline.config.validate import validate

VOCAB = 32768
SETTINGS = [
    *("model.num_layers=8", "model.hidden_size=1024", "model.num_attention_heads=8", "model.num_query_groups=2"),
    *("model.ffn_hidden_size=4096", "model.segment_length=512", "train.lanes=8", "train.segments_per_window=4"),
    *("train.precision=bf16", "train.probes_per_window=0"),
]
RATES = Rates(20e12, 25e9, 100e9, 2e-6)


def everything(world: int):
    """All that `search` may find, by asking `validate` about every combination of numbers."""
    base, numbers = load_config(None, SETTINGS), (1, 2, 4, 8)
    layouts = itertools.product(numbers, numbers, numbers, (1, 3), (1, 2, 4), RECOMPUTE, numbers)
    for tensor, context, pipeline, zero, chunks, recompute, lanes in layouts:
        parallel = ParallelConfig(tensor, context, pipeline, zero_stage=zero, sequence_parallel=tensor > 1)
        bptt = replace(base.bptt, chunks_per_window=chunks, recompute=recompute)
        config = replace(base, parallel=parallel, bptt=bptt, train=replace(base.train, lanes_per_microbatch=lanes))
        with contextlib.suppress(ConfigError):
            validate(config, world, data_exists=False)
            yield config


@pytest.fixture(scope="module")
def every():
    return [
        (config, max(needs.total for needs in per_rank_bytes(config, 4, VOCAB)), predict_step(config, 4, VOCAB, RATES))
        for config in everything(4)
    ]


@pytest.fixture(autouse=True)
def even_splits(monkeypatch):
    """Layers as `everything` has them."""
    monkeypatch.setattr(searching, "_splits", lambda *_: [None])


@pytest.mark.parametrize("memory", [2.0e9, 2.6e9, 80e9])
def test_the_first_layout_is_the_fastest_of_all_that_fit(every, memory):
    found = search(load_config(None, SETTINGS), 4, VOCAB, int(memory), RATES, gpus_per_node=4)
    assert found.variants == len(every)
    fits = [step.step_s for _, size, step in every if size <= 0.9 * memory]
    assert 0 < len(fits) < len(every) or memory == 80e9
    best = found.fitting[0]
    assert best.prediction.step_s == pytest.approx(min(fits), rel=0.01)
    assert all(layout.largest.total <= 0.9 * memory for layout in found.fitting)
    assert all(layout.largest.total > 0.9 * memory for layout in found.too_large)
    # The settings that it prints are the layout.
    again = load_config(None, [*SETTINGS, *best.settings])
    validate(again, 4, data_exists=False)
    assert predict_step(again, 4, VOCAB, RATES) == best.prediction


def test_the_closed_form_is_near_the_simulated_step(every):
    for config, _, step in every:
        needs = per_rank_bytes(config, 4, VOCAB)
        assert quick_step_s(config, 4, VOCAB, RATES, needs) == pytest.approx(step.step_s, rel=0.2)


def test_layers_are_balanced_against_the_output_matrix(monkeypatch):
    monkeypatch.undo()
    config = load_config(None, [*SETTINGS, "model.num_layers=32"])
    # 67 MFLOP of output per token, 27 MFLOP a layer: two and a half layers, of which the last stage has so many fewer.
    assert searching._splits(config, 4, VOCAB) == [None, [9, 9, 8, 6]]
    assert searching._splits(config, 1, VOCAB) == [None]


def test_what_no_layout_can_run_is_refused_with_the_reason():
    with pytest.raises(NoLayoutError, match=r"no layout of 3 devices .* train.lanes = 8: must be a multiple of .* 3"):
        search(load_config(None, [*SETTINGS, "model.num_layers=2"]), 3, VOCAB, int(80e9), RATES, gpus_per_node=1)


def test_a_start_of_a_kernel_takes_what_the_host_takes():
    config = load_config(None, [*SETTINGS, "bptt.recompute=none"])
    slow = Rates(RATES.flops_per_s, RATES.link_bytes_per_s, RATES.node_bytes_per_s, 1e-3)
    # 8 layers, 8 lanes in one microbatch, 64 + 84 kernels of the delta rule.
    assert predict_step(config, 1, VOCAB, slow).pipeline_s == pytest.approx(8 * (64 + 84) * 1e-3)
