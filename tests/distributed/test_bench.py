"""The benchmarks of the schedule at the smallest size: what they measure is what is there."""

from __future__ import annotations

import pytest
import torch

from pipeline.accounting.live_bytes import LiveBytes
from pipeline.benchmarks import pipeline as bench_pipeline
from pipeline.benchmarks import window as bench_window
from pipeline.benchmarks.pipeline import Measured, Recorder, mean_costs, message_latency, order_agreement
from pipeline.schedule.operations import Kind, Operation, build_schedule, expected_peak_live_chunks
from pipeline.schedule.simulate import Event, Timeline

pytestmark = pytest.mark.distributed


def test_live_bytes_counts_storages_once_and_until_they_are_freed():
    with LiveBytes() as live:
        a = torch.ones(1000)  # 4,000 bytes
        b = a.view(10, 100)[2:]
        assert live.bytes == 4000
        c = a.double()
        assert live.bytes == live.peak == 12000
        c.mul_(2)
        assert live.bytes == 12000
        del c
        assert live.bytes == 4000
        del a
        assert live.bytes == 4000  # b still holds it
        del b
        assert live.bytes == 0
    assert live.peak == 12000


def test_live_bytes_sees_what_autograd_keeps_and_frees():
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        y = x.exp().sin().exp().sum()  # keeps the results of both exp, not that of sin
        kept = live.bytes
        assert kept == 2 * 4000 + 4
        y.backward()
        assert live.bytes < kept
        assert x.grad is not None


def peaks(pools, method, *lengths):
    return [pools.run(1, bench_window.measure_window, method=method, segments=n)[0].peak_bytes for n in lengths]


def test_window_recomputation_is_flat_and_the_others_are_not(pools):
    plain, window = (peaks(pools, method, 4, 16) for method in ("plain", "window"))
    layer = peaks(pools, "layer", 16, 64)  # long enough for the half MiB that functions take at a time not to count
    assert plain[1] > 3.9 * plain[0]
    assert layer[1] > 3.8 * layer[0]
    assert window[0] == plain[0]  # one chunk is the whole window
    assert window[1] < 1.05 * window[0]


def test_a_document_has_one_gradient_whatever_the_chunks(pools):
    first, second = (
        pools.run(1, bench_window.measure_document, segments=32, chunk_segments=size, last_segment_only=True)[0]
        for size in (4, 16)
    )
    assert first.first_segment.shape == (64, 32)
    assert first.first_segment.abs().max() > 0
    assert max(bench_window.largest_difference(first, second).values()) < 1e-12
    all_of_it = pools.run(1, bench_window.measure_document, segments=32, chunk_segments=4, last_segment_only=False)[0]
    assert all_of_it.loss == first.loss
    assert bench_window.largest_difference(first, all_of_it)["first segment"] > 0.1


def test_pipeline_is_measured_next_to_its_simulation(pools, tmp_path):
    everyone = pools.run(
        2,
        bench_pipeline.measure,
        pipeline=2,
        lanes=2,
        repeats=1,
        chunk_s=0.01,
        model=["model.segment_length=8", "model.hidden_size=16", "model.num_layers=2", "model.ffn_hidden_size=24"],
    )
    results = {(r.variant, r.paced): r for r in everyone[0]}
    assert len(results) == 6
    for (variant, paced), result in results.items():
        chunks, replay = (1 if variant == "1f1b" else 4), "window" in variant
        for stage, events in enumerate(result.timeline.events):
            shape = {"stages": 2, "stage": stage, "microbatches": 2, "chunks": chunks, "replay": replay}
            assert [e.operation for e in events] == build_schedule(**shape)
            assert result.live_chunks[stage] == expected_peak_live_chunks(**shape)
            assert [e.operation for e in result.simulated.events[stage]] == [e.operation for e in events]
        if paced:
            slowest = [e for events in result.timeline.events for e in events if e.operation.kind is Kind.BACKWARD]
            assert min(e.end_s - e.start_s for e in slowest) >= 0.02 * 4 / chunks
    whole, pieces = results["1f1b", True], results["segment_1f1b", True]
    assert pieces.simulated.bubble_share < whole.simulated.bubble_share
    assert results["segment_1f1b, recompute window", True].live_bytes[0] < pieces.live_bytes[0] < whole.live_bytes[0]

    path = tmp_path / "results.json"
    bench_pipeline.write_results(path, everyone[0])
    assert bench_pipeline.read_results(path) == everyone[0]


# What is computed from timelines, by hand.


def event(kind, start, end, chunk=0):
    return Event(Operation(kind, 0, chunk), start, end)


def test_recorder_keeps_the_pace_and_counts_overruns():
    recorder = Recorder({Kind.FORWARD: 0.02, Kind.BACKWARD: 0.0})
    for operation in (
        Operation(Kind.FORWARD, 0, 0),
        Operation(Kind.SEND_FORWARD, 0, 0),
        Operation(Kind.BACKWARD, 0, 0),
    ):
        recorder(operation)
    sum(range(10_000))
    recorder(None)
    forward, send, backward = recorder.events
    assert forward.end_s - forward.start_s >= 0.02
    assert send.end_s - send.start_s < 0.02
    assert recorder.overruns == 1
    assert [e.operation.kind for e in recorder.events] == [Kind.FORWARD, Kind.SEND_FORWARD, Kind.BACKWARD]


def test_latency_is_taken_from_waits_that_began_before_the_send():
    timeline = Timeline(
        [
            [event(Kind.SEND_FORWARD, 5, 5), event(Kind.SEND_FORWARD, 9, 9, chunk=1)],
            [event(Kind.WAIT_FORWARD, 0, 7), event(Kind.WAIT_FORWARD, 20, 20, chunk=1)],
        ]
    )
    assert message_latency(timeline) == 2


def test_costs_are_means_of_computations():
    events = [event(Kind.FORWARD, 0, 1), event(Kind.FORWARD, 2, 5, 1), event(Kind.WAIT_BACKWARD, 5, 9)]
    assert mean_costs(events) == {Kind.FORWARD: 2}


def test_order_agreement_notices_what_ran_early():
    def timeline(second_stage_start):
        return Timeline(
            [[event(Kind.FORWARD, 0, 1)], [event(Kind.FORWARD, second_stage_start, second_stage_start + 1)]]
        )

    assert order_agreement(timeline(1), timeline(1.3)) == 1
    assert order_agreement(timeline(1), timeline(-1)) == 0


def test_measured_bubble_is_what_is_left_of_the_step():
    timeline = Timeline([[event(Kind.FORWARD, 10, 11)], [event(Kind.FORWARD, 11, 14)]])
    measured = Measured("x", True, timeline, timeline, 0.0, [0.5], 0.0, 0, [1, 1], [0, 0])
    assert measured.timeline.makespan_s == 4
    assert measured.timeline.bubble_share == 0.5
