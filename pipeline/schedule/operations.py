"""The pipeline schedule as data: for every stage the list of operations that one step runs.

The unit of work is a chunk (some segments of a microbatch, which is the window of some lanes). Forwards run first-in
first-out over (microbatch, chunk); backwards run over microbatches first-in first-out and over the chunks of one
last-in first-out, because the gradient of the memory flows backwards in time. This is the order of Seq1F1B
(arXiv 2406.03488); with one chunk per microbatch it is ordinary 1F1B.

A stage warms up with as many forwards as there are stages behind it plus the chunks of a microbatch but one (only
then can the first backward run), alternates forward and backward while there are forwards left, and cools down with
backwards.

Receives are posted one computation ahead of their use. With that, even sends that wait for their receiver (rendezvous)
cannot deadlock; `tests/pipeline/schedule/test_schedule.py` proves it by exhaustive simulation over many shapes.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from pipeline.config.schema import Config


class Kind(Enum):
    """What an operation does."""

    POST_FORWARD = "post receive of hidden states"
    POST_BACKWARD = "post receive of their gradient"
    WAIT_FORWARD = "wait for hidden states"
    WAIT_BACKWARD = "wait for their gradient"
    FORWARD = "forward"
    REPLAY = "forward again, with gradients"
    BACKWARD = "backward"
    SEND_FORWARD = "send hidden states"
    SEND_BACKWARD = "send their gradient"

    __hash__ = object.__hash__  # Enum's own is written in Python, and a simulated step hashes every operation


COMPUTE = (Kind.FORWARD, Kind.REPLAY, Kind.BACKWARD)


class Operation(NamedTuple):
    kind: Kind
    microbatch: int
    """Index of the microbatch: the window of a group of lanes."""
    chunk: int
    """Index of the chunk in the microbatch."""

    def of_kind(self, kind: Kind) -> Operation:
        """Another thing done to the same chunk; `_replace` takes longer, and a plan's search asks a million times."""
        return Operation(kind, self.microbatch, self.chunk)


def compute_order(*, stages: int, stage: int, microbatches: int, chunks: int) -> list[Operation]:
    """Forwards and backwards of a stage, without communication."""
    forwards = [Operation(Kind.FORWARD, m, c) for m in range(microbatches) for c in range(chunks)]
    backwards = [Operation(Kind.BACKWARD, m, c) for m in range(microbatches) for c in reversed(range(chunks))]
    warm_up = min(stages - 1 - stage + chunks - 1, len(forwards))
    order = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - warm_up :]


def add_replays(order: list[Operation]) -> list[Operation]:
    """Put a replay before every backward whose forward is not the computation just before it."""
    result: list[Operation] = []
    for operation in order:
        if operation.kind is Kind.BACKWARD:
            forward = operation.of_kind(Kind.FORWARD)
            if not result or result[-1] != forward:
                result.append(operation.of_kind(Kind.REPLAY))
        result.append(operation)
    return result


def configured_schedule(config: Config, *, stage: int, microbatches: int) -> list[Operation]:
    """`build_schedule` for a stage of a configuration's pipeline, and the chunks and recomputation of its windows."""
    return build_schedule(
        stages=config.parallel.pipeline,
        stage=stage,
        microbatches=microbatches,
        chunks=config.bptt.chunks_per_window,
        replay=config.bptt.recompute == "window",
    )


def build_schedule(*, stages: int, stage: int, microbatches: int, chunks: int, replay: bool) -> list[Operation]:
    """All operations of one stage for one step, communication included.

    Args:
        stages: pipeline stages.
        stage: index of this stage.
        microbatches: in the step.
        chunks: chunks per microbatch.
        replay: keep no activations in the forward pass and run a chunk again before its backward.

    Raises:
        ValueError: a count that is not positive.
    """
    if min(stages, microbatches, chunks) < 1 or not 0 <= stage < stages:
        raise ValueError(
            f"no schedule for stage {stage} of {stages} with {microbatches} microbatches of {chunks} chunks"
        )
    order = compute_order(stages=stages, stage=stage, microbatches=microbatches, chunks=chunks)
    if replay:
        order = add_replays(order)
    first, last = stage == 0, stage == stages - 1

    def receive(operation: Operation) -> tuple[Operation, Operation] | None:
        """The post and the wait that `operation` needs."""
        if operation.kind is Kind.FORWARD and not first:
            return operation.of_kind(Kind.POST_FORWARD), operation.of_kind(Kind.WAIT_FORWARD)
        if operation.kind is Kind.BACKWARD and not last:
            return operation.of_kind(Kind.POST_BACKWARD), operation.of_kind(Kind.WAIT_BACKWARD)
        return None

    operations: list[Operation] = []
    receives = [receive(operation) for operation in order]
    if receives[0]:
        operations.append(receives[0][0])
    for i, operation in enumerate(order):
        if receives[i]:
            operations.append(receives[i][1])
        if i + 1 < len(order) and receives[i + 1]:
            operations.append(receives[i + 1][0])
        operations.append(operation)
        if operation.kind is Kind.FORWARD and not last:
            operations.append(operation.of_kind(Kind.SEND_FORWARD))
        if operation.kind is Kind.BACKWARD and not first:
            operations.append(operation.of_kind(Kind.SEND_BACKWARD))
    return operations


def build_forward_schedule(*, stages: int, stage: int, microbatches: int, chunks: int) -> list[Operation]:
    """Operations of one stage for an evaluation: forwards only."""
    operations: list[Operation] = []
    for microbatch in range(microbatches):
        for chunk in range(chunks):
            if stage > 0:
                operations += [
                    Operation(Kind.POST_FORWARD, microbatch, chunk),
                    Operation(Kind.WAIT_FORWARD, microbatch, chunk),
                ]
            operations.append(Operation(Kind.FORWARD, microbatch, chunk))
            if stage < stages - 1:
                operations.append(Operation(Kind.SEND_FORWARD, microbatch, chunk))
    return operations


def peak_live_chunks(operations: list[Operation]) -> int:
    """Largest number of chunks whose activations are held at once."""
    replayed = {(o.microbatch, o.chunk) for o in operations if o.kind is Kind.REPLAY}
    live = peak = 0
    for kind, microbatch, chunk in operations:
        if kind is Kind.REPLAY or (kind is Kind.FORWARD and (microbatch, chunk) not in replayed):
            live += 1
            peak = max(peak, live)
        elif kind is Kind.BACKWARD:
            live -= 1
    return peak


def expected_peak_live_chunks(*, stages: int, stage: int, microbatches: int, chunks: int, replay: bool) -> int:
    """The same by derivation: the chunks of a microbatch, and one more for every stage behind; one with replay."""
    return 1 if replay else min(stages - 1 - stage + chunks, microbatches * chunks)
