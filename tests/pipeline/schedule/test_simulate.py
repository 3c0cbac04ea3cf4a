"""The simulator against timelines that can be worked out on paper."""

from __future__ import annotations

import pytest
from matplotlib.image import imread

from pipeline.schedule.draw import draw_timelines
from pipeline.schedule.operations import COMPUTE, Kind, Operation, build_forward_schedule, build_schedule
from pipeline.schedule.simulate import Costs, simulate


def programs_of(stages, microbatches, chunks, replay=False):
    shape = {"stages": stages, "microbatches": microbatches, "chunks": chunks, "replay": replay}
    return [build_schedule(stage=stage, **shape) for stage in range(stages)]


def even(stages, forward=1.0, backward=2.0, **transfer):
    return Costs([{Kind.FORWARD: forward, Kind.REPLAY: forward, Kind.BACKWARD: backward}] * stages, **transfer)


def times(timeline, stage, *kinds):
    return [(e.start_s, e.end_s) for e in timeline.events[stage] if e.operation.kind in kinds]


@pytest.mark.parametrize("stages", range(1, 7))
@pytest.mark.parametrize("microbatches", [1, 2, 5, 9])
def test_1f1b_has_its_known_bubble(stages, microbatches):
    timeline = simulate(programs_of(stages, microbatches, 1), even(stages))
    assert timeline.makespan_s == (microbatches + stages - 1) * 3
    assert timeline.bubble_share == pytest.approx((stages - 1) / (microbatches + stages - 1))


def test_chunks_shrink_the_bubble():
    """The same work in four times as many pieces: the pipeline fills four times as fast."""
    whole = simulate(programs_of(4, 4, 1), even(4, 4.0, 8.0))
    pieces = simulate(programs_of(4, 4, 4), even(4))
    assert sum(whole.compute_s(s) for s in range(4)) == sum(pieces.compute_s(s) for s in range(4))
    assert pieces.makespan_s < whole.makespan_s
    assert pieces.bubble_share < 0.5 * whole.bubble_share
    # In pieces of four, stage s holds 4 + 3 - s of them, in whole ones 4 - s.
    assert pieces.peak_live_chunks == [7, 6, 5, 4]
    assert whole.peak_live_chunks == [4, 3, 2, 1]


def test_transfers_add_up_on_the_critical_path():
    costs = even(2, message_bytes=100, bytes_per_s=200.0, latency_s=0.25)
    timeline = simulate(programs_of(2, 1, 1), costs)
    assert times(timeline, 0, *COMPUTE) == [(0, 1), (4.75 + 0.75, 7.5)]
    assert times(timeline, 0, Kind.SEND_FORWARD) == [(1, 1.75)]
    assert times(timeline, 1, *COMPUTE) == [(1.75, 2.75), (2.75, 4.75)]
    assert times(timeline, 1, Kind.SEND_BACKWARD) == [(4.75, 5.5)]
    assert times(timeline, 0, Kind.WAIT_BACKWARD) == [(1, 5.5)]
    assert timeline.bubble_share == pytest.approx(1 - 3 / 7.5)
    assert [timeline.messages_sent(s) for s in range(2)] == [1, 1]


def test_a_slow_link_carries_one_message_after_the_other():
    """Forwards of 1 s over a link of 5 s a message: a message every 5 s, each another 0.5 s on its way."""
    costs = Costs([{Kind.FORWARD: 1.0}] * 2, message_bytes=5, bytes_per_s=1.0, latency_s=0.5)
    sends, receives = (build_forward_schedule(stages=2, stage=s, microbatches=1, chunks=3) for s in range(2))
    receives.sort(key=lambda operation: operation.kind is not Kind.POST_FORWARD)  # all posted at the start
    timeline = simulate([sends, receives], costs)
    assert times(timeline, 0, Kind.SEND_FORWARD) == [(1, 6.5), (6, 11.5), (11, 16.5)]
    assert times(timeline, 1, Kind.FORWARD) == [(6.5, 7.5), (11.5, 12.5), (16.5, 17.5)]


def test_a_transfer_waits_for_its_receive():
    """Without looking ahead, the receive of the second message is posted when the first one has been worked on."""
    costs = Costs([{Kind.FORWARD: 1.0}, {Kind.FORWARD: 10.0}], message_bytes=1, bytes_per_s=1.0)
    posts_late = [build_forward_schedule(stages=2, stage=s, microbatches=1, chunks=2) for s in range(2)]
    assert times(simulate(posts_late, costs), 0, Kind.SEND_FORWARD) == [(1, 2), (12, 13)]


def test_replay_costs_a_forward():
    plain, replayed = (simulate(programs_of(1, 2, 4, replay), even(1)) for replay in (False, True))
    assert plain.makespan_s == 8 * 3
    # The last chunk of each microbatch goes backward at once, without a replay.
    replays = sum(e.operation.kind is Kind.REPLAY for e in replayed.events[0])
    assert replays == 6
    assert replayed.makespan_s == 8 * 3 + replays
    assert replayed.peak_live_chunks == [1]
    assert replayed.bubble_share == 0


@pytest.mark.parametrize("replay", [False, True])
def test_every_operation_happens_once_and_stages_do_one_thing_at_a_time(replay):
    programs = programs_of(4, 3, 3, replay)
    timeline = simulate(programs, even(4, message_bytes=8, bytes_per_s=16.0, latency_s=0.1))
    for program, events in zip(programs, timeline.events, strict=True):
        assert [e.operation for e in events] == program
        own = [e for e in events if e.operation.kind not in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)]
        assert all(a.end_s <= b.start_s for a, b in zip(own[:-1], own[1:], strict=True))


def test_stages_of_unequal_speed():
    """The slowest stage sets the pace; it has the smallest bubble."""
    costs = Costs([{Kind.FORWARD: s, Kind.BACKWARD: 2 * s} for s in (1.0, 2.0, 1.0)])
    timeline = simulate(programs_of(3, 8, 1), costs)
    assert timeline.bubble_shares[1] == min(timeline.bubble_shares)
    # A forward of stage 0, eight microbatches on stage 1 with one gap in warm-up, a backward of stage 0.
    assert timeline.makespan_s == 1 + (8 * 6 + 1) + 2


def test_a_schedule_that_cannot_run_is_named():
    programs = programs_of(2, 1, 1)
    programs[1] = [o for o in programs[1] if o.kind is not Kind.SEND_BACKWARD]
    with pytest.raises(ValueError, match=r"cannot run: stage 0 at wait for their gradient \(0, 0\)"):
        simulate(programs, even(2))


def test_drawing(tmp_path):
    path = tmp_path / "timeline.png"
    costs = even(3, message_bytes=1, bytes_per_s=10.0)
    one, many = (simulate(programs_of(3, 2, chunks, chunks > 1), costs) for chunks in (1, 2))
    draw_timelines(path, [("1f1b", one), ("segment_1f1b", many)])
    image = imread(path)
    assert image.shape[1] > 1000
    # Forward blue, replay green, backward orange are there: the legend alone has far fewer pixels.
    for color in ((0x4C, 0x78, 0xA8), (0x72, 0xB7, 0xB2), (0xF2, 0xA5, 0x41)):
        assert (abs(image[..., :3] * 255 - color).max(axis=-1) < 2).sum() > 5000
    assert list(tmp_path.iterdir()) == [path]


def test_operation_lists_of_one_stage_need_no_messages():
    timeline = simulate([[Operation(Kind.FORWARD, 0, 0)]], even(1))
    assert timeline.messages_sent(0) == 0
    assert timeline.makespan_s == 1
