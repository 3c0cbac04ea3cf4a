"""The schedule proved by exhaustion: every shape up to 6 stages, 6 microbatches and 6 chunks, with and without replay.

The proofs use an interpreter of their own, which knows nothing of how the lists are made. Whether a stage can go on
depends only on what others have done before, never on what they have not done yet, so going on earlier or later
cannot change who gets stuck: one run of the interpreter stands for every timing.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from pipeline.schedule.operations import (
    Kind,
    Operation,
    build_forward_schedule,
    build_schedule,
    expected_peak_live_chunks,
    peak_live_chunks,
)

GRIDS = [
    pytest.param([(stages, w, c, replay) for w in range(1, 7) for c in range(1, 7)], id=f"{stages} stages{name}")
    for stages in range(1, 7)
    for replay, name in ((False, ""), (True, ", replay"))
]
"""Shapes (stages, microbatches, chunks, replay)."""

FORWARD, BACKWARD = "forward", "backward"
POSTS = {Kind.POST_FORWARD: FORWARD, Kind.POST_BACKWARD: BACKWARD}
WAITS = {Kind.WAIT_FORWARD: FORWARD, Kind.WAIT_BACKWARD: BACKWARD}
SENDS = {Kind.SEND_FORWARD: FORWARD, Kind.SEND_BACKWARD: BACKWARD}


class Deadlock(AssertionError):
    """No stage can go on; the message says where each one stands."""


def programs_of(stages, microbatches, chunks, replay):
    shape = {"stages": stages, "microbatches": microbatches, "chunks": chunks, "replay": replay}
    return [build_schedule(stage=stage, **shape) for stage in range(stages)]


def run_with_rendezvous(programs, *, queues, connects=False):
    """Run all stages with sends that block until their receive has been posted.

    Args:
        queues: `none`: a transfer takes place as soon as both sides have asked for it (gloo, which matches by tag).
            `two`: a stage's sends and receives in one direction wait in one queue, and a transfer takes place at the
            head of both sides' queues (NCCL with a group for each direction). `one`: both directions share a queue.
        connects: connections are made by their first use (NCCL), not before.

    Raises:
        Deadlock: some stages can never go on.
    """
    position = [0] * len(programs)
    waiting, at_connection = defaultdict(list), defaultdict(set)
    arrived, entered = set(), set()

    def queue(stage, way):
        return waiting[stage, "both" if queues == "one" else way]

    def transfer(sender, way, item):
        """Take the transfer out of both queues if it can happen now."""
        receiver = sender + (1 if way == FORWARD else -1)
        sent, posted = queue(sender, way), queue(receiver, way)
        send, receive = ("send", way, item), ("receive", way, item)
        if receive not in posted or (queues != "none" and (sent[0] != send or posted[0] != receive)):
            return False
        sent.remove(send)
        posted.remove(receive)
        arrived.add((receiver, way, item))
        return True

    def go_on(stage):
        kind, *item = programs[stage][position[stage]]
        item = tuple(item)
        if kind in POSTS:
            queue(stage, POSTS[kind]).append(("receive", POSTS[kind], item))
        elif kind in WAITS:
            return (stage, WAITS[kind], item) in arrived
        elif kind in SENDS:
            way = SENDS[kind]
            if (stage, way, item) not in entered:
                queue(stage, way).append(("send", way, item))
                entered.add((stage, way, item))
            return transfer(stage, way, item)
        return True

    def connected(stage):
        """Whether the connection that the operation uses is there; with `connects`, it is made by its first use, and
        both sides wait for each other there."""
        kind = programs[stage][position[stage]].kind
        if not connects or kind in WAITS or not (way := (POSTS | SENDS).get(kind)):
            return True
        onwards = (kind in SENDS) == (way == FORWARD)
        link = (way, stage if onwards else stage - 1)
        at_connection[link].add(stage)
        return len(at_connection[link]) == 2

    moved = True
    while moved:
        moved = False
        for stage, program in enumerate(programs):
            while position[stage] < len(program) and connected(stage) and go_on(stage):
                position[stage] += 1
                moved = True
    stuck = {s: programs[s][position[s]] for s in range(len(programs)) if position[s] < len(programs[s])}
    if stuck:
        raise Deadlock("; ".join(f"stage {s} at {kind.value} {w}.{c}" for s, (kind, w, c) in stuck.items()))
    assert not any(waiting.values()), "transfers left over"


@pytest.mark.parametrize("shapes", GRIDS)
def test_compute_respects_data_and_memory(shapes):
    for shape in shapes:
        stages, microbatches, chunks, replay = shape
        everything = {(m, c) for m in range(microbatches) for c in range(chunks)}
        for program in programs_of(*shape):
            at = {(kind, w, c): i for i, (kind, w, c) in enumerate(program)}
            assert len(at) == len(program), "an operation stands twice"
            for kind in (Kind.FORWARD, Kind.BACKWARD):
                assert {key[1:] for key in at if key[0] is kind} == everything
            for w, c in everything:
                forward, backward = at[Kind.FORWARD, w, c], at[Kind.BACKWARD, w, c]
                assert forward < backward
                if c > 0:  # memory flows on in time, its gradient back
                    assert at[Kind.FORWARD, w, c - 1] < forward
                    assert backward < at[Kind.BACKWARD, w, c - 1]
                again = at.get((Kind.REPLAY, w, c))
                if not replay:
                    assert again is None
                elif again is None:
                    between = [o for o in program[forward + 1 : backward] if o.kind in (Kind.FORWARD, Kind.BACKWARD)]
                    assert not between, "a forward that is not replayed must be followed by its own backward"
                else:
                    assert forward < again < backward


@pytest.mark.parametrize("shapes", GRIDS)
def test_communication_surrounds_its_computation(shapes):
    for shape in shapes:
        for stage, program in enumerate(programs_of(*shape)):
            at = {(kind, w, c): i for i, (kind, w, c) in enumerate(program)}
            for kind, receives, post, wait, send, sends in (
                (
                    Kind.FORWARD,
                    stage > 0,
                    Kind.POST_FORWARD,
                    Kind.WAIT_FORWARD,
                    Kind.SEND_FORWARD,
                    stage < shape[0] - 1,
                ),
                (
                    Kind.BACKWARD,
                    stage < shape[0] - 1,
                    Kind.POST_BACKWARD,
                    Kind.WAIT_BACKWARD,
                    Kind.SEND_BACKWARD,
                    stage > 0,
                ),
            ):
                for (_, w, c), i in ((key, i) for key, i in at.items() if key[0] is kind):
                    assert ((post, w, c) in at) == ((wait, w, c) in at) == receives
                    assert ((send, w, c) in at) == sends
                    assert not receives or at[post, w, c] < at[wait, w, c] < i
                    assert not sends or i < at[send, w, c]
                    if kind is Kind.FORWARD and sends and (Kind.BACKWARD, w, c) in at:
                        assert at[send, w, c] < at[Kind.BACKWARD, w, c]


@pytest.mark.parametrize("shapes", GRIDS)
def test_sends_and_receives_match_in_order(shapes):
    """One to one, and posted in the order in which they are sent: no tag is needed to tell two transfers apart."""
    for shape in shapes:
        programs = programs_of(*shape)
        for sender, program in enumerate(programs):
            for send, post, receiver in (
                (Kind.SEND_FORWARD, Kind.POST_FORWARD, sender + 1),
                (Kind.SEND_BACKWARD, Kind.POST_BACKWARD, sender - 1),
            ):
                sent = [o[1:] for o in program if o.kind is send]
                posted = [o[1:] for o in programs[receiver] if o.kind is post] if 0 <= receiver < len(programs) else []
                assert sent == posted


@pytest.mark.parametrize("queues", ["none", "two"])
@pytest.mark.parametrize("shapes", GRIDS)
def test_no_deadlock(shapes, queues):
    for shape in shapes:
        run_with_rendezvous(programs_of(*shape), queues=queues)


@pytest.mark.parametrize("shapes", GRIDS)
def test_peak_live_chunks_are_as_derived(shapes):
    for shape in shapes:
        stages, microbatches, chunks, replay = shape
        for stage, program in enumerate(programs_of(*shape)):
            expected = expected_peak_live_chunks(
                stages=stages, stage=stage, microbatches=microbatches, chunks=chunks, replay=replay
            )
            assert peak_live_chunks(program) == count_live(program) == expected


def count_live(program):
    """Graphs that exist at once, by keeping each one until its backward."""
    later = Counter(o[1:] for o in program if o.kind is Kind.REPLAY)
    live, sizes = set(), []
    for kind, *item in program:
        item = tuple(item)
        if kind is Kind.REPLAY or (kind is Kind.FORWARD and not later[item]):
            live.add(item)
        elif kind is Kind.BACKWARD:
            live.remove(item)
        sizes.append(len(live))
    assert not live
    return max(sizes)


def test_one_chunk_per_microbatch_is_1f1b():
    order = [(o.kind, o.microbatch) for o in build_schedule(stages=3, stage=1, microbatches=3, chunks=1, replay=False)]
    forward_and_backward = [o for o in order if o[0] in (Kind.FORWARD, Kind.BACKWARD)]
    f, b = Kind.FORWARD, Kind.BACKWARD
    assert forward_and_backward == [(f, 0), (f, 1), (b, 0), (f, 2), (b, 1), (b, 2)]


@pytest.mark.parametrize("stages", range(1, 7))
@pytest.mark.parametrize("queues", ["none", "two"])
def test_forward_schedule_runs_through(stages, queues):
    programs = [build_forward_schedule(stages=stages, stage=s, microbatches=3, chunks=4) for s in range(stages)]
    run_with_rendezvous(programs, queues=queues)


# Broken on purpose: the proofs above must be able to fail.


def without_looking_ahead(program):
    """Every receive is posted only when it is waited for."""
    waits = {kind: post for post, kind in zip(POSTS, WAITS, strict=True)}
    result = []
    for operation in program:
        if operation.kind in waits:
            result.append(operation._replace(kind=waits[operation.kind]))
        if operation.kind not in POSTS:
            result.append(operation)
    return result


@pytest.mark.parametrize("queues", ["none", "two"])
@pytest.mark.parametrize("replay", [False, True])
def test_without_looking_ahead_rendezvous_deadlocks(queues, replay):
    programs = [without_looking_ahead(program) for program in programs_of(2, 2, 2, replay)]
    with pytest.raises(Deadlock, match="stage 0 at send hidden states .*; stage 1 at send their gradient"):
        run_with_rendezvous(programs, queues=queues)


def test_backwards_first_in_first_out_inside_a_microbatch_deadlock():
    """The order of ordinary pipelines, which the gradient of the memory does not allow."""
    programs = programs_of(3, 2, 3, False)
    programs[1] = [
        Operation(o.kind, o.microbatch, 2 - o.chunk)
        if o.kind in (*WAITS, Kind.SEND_BACKWARD) and "gradient" in o.kind.value
        else o
        for o in programs[1]
    ]
    with pytest.raises(Deadlock):
        run_with_rendezvous(programs, queues="two")


def test_one_queue_for_both_directions_deadlocks():
    """Why forward and backward traffic have groups of their own."""
    with pytest.raises(Deadlock):
        run_with_rendezvous(programs_of(2, 2, 2, False), queues="one")


def test_connections_made_by_their_first_use_deadlock():
    """Stage 0 posts the receive of the gradient before it computes what the gradient is of."""
    with pytest.raises(Deadlock, match="stage 0 at post receive of their gradient"):
        run_with_rendezvous(programs_of(2, 1, 1, False), queues="two", connects=True)
