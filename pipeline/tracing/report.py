"""A traced step as numbers for JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pipeline.tracing.evaluation import EvaluationTrace
from pipeline.tracing.host_reads import listed
from pipeline.tracing.ledger import DTYPE_COPY, HostRead
from pipeline.tracing.step import PASSES, StepTrace


def operations(trace: StepTrace) -> list[tuple[str, dict[str, float]]]:
    """Of every operation in the layers its launches per layer and chunk, by pass; the most frequent first."""
    counts: dict[str, Counter[str]] = {}
    for launch, count in trace.launches.items():
        if launch.in_layers:
            counts.setdefault(launch.operation, Counter())[launch.phase] += count
    most = sorted(counts.items(), key=lambda item: -item[1].total())
    per = trace.layers * trace.chunks
    return [(name, {phase: count / per for phase, count in phases.items()}) for name, phases in most]


def dtype_copies(trace: StepTrace) -> float:
    """Per layer and chunk."""
    return trace.in_layers(operation=str(DTYPE_COPY))


def as_json(trace: StepTrace, evaluation: EvaluationTrace | None = None) -> dict[str, Any]:
    """All of a trace. Bytes are bytes; launches are per layer and chunk where the name says so, else counts."""
    return {
        "rank": trace.rank,
        "stage": trace.stage,
        "layers": trace.layers,
        "microbatches_traced": trace.microbatches,
        "microbatches_per_step": trace.microbatches_per_step,
        "chunks_traced": trace.chunks,
        "parameters": trace.parameter_count,
        "setup_peak_bytes": trace.setup_peak_bytes,
        "peak_bytes": trace.peak_bytes,
        "at_peak_bytes": trace.at_peak,
        "launches_per_layer_and_chunk": {
            "all": trace.in_layers(),
            **{phase: trace.in_layers(phase) for phase in PASSES},
            "dtype_copies": dtype_copies(trace),
            "operations": dict(operations(trace)),
        },
        "launches_per_chunk_beside_layers": sum(trace.beside_layers(phase) for phase in PASSES),
        "launches_per_step": {
            phase: sum(count for launch, count in trace.launches.items() if launch.phase == phase)
            for phase in sorted({launch.phase for launch in trace.launches} - set(PASSES))
        },
        "dtype_copies_in_layers": {f"{a} to {b}": count for (a, b), count in trace.dtype_copies.items()},
        "collectives": [
            {"group": key.group, "kind": key.kind, "calls": traffic.calls, "bytes": traffic.bytes}
            for key, traffic in trace.collectives.items()
        ],
        "host_reads": _reads(trace.reads),
        "evaluation": evaluation
        and {
            "documents": evaluation.documents,
            "windows": evaluation.windows,
            "peak_bytes": evaluation.peak_bytes,
            "host_reads": _reads(evaluation.reads),
        },
        "seconds": trace.seconds,
    }


def _reads(reads: Counter[HostRead]) -> list[dict[str, Any]]:
    return [
        {
            "place": f"{read.place.file}:{read.place.line}",
            "function": read.place.function,
            "operation": read.operation,
            "times": times,
            "reason": listed(read.place),
        }
        for read, times in reads.items()
    ]
