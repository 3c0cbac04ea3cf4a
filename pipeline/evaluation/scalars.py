"""The main numbers of an evaluation under the names that they have in TensorBoard and `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.reporting.evaluation_metrics import loss_metric
from pipeline.reporting.set_names import set_names

Results = dict[str, Any]


def sets_by_name(results: Results) -> dict[str, tuple[str, dict[str, Any]]]:
    """Path and facts of every evaluated set, by its name."""
    return dict(zip(set_names(results["perplexity"]), results["perplexity"].items(), strict=True))


def label(settings: dict[str, float], names: list[str] | None = None) -> str:
    """`pairs 4, length 1024`."""
    return ", ".join(f"{name} {value:g}" for name, value in settings.items() if names is None or name in names)


def by_length(results: Results, control: str) -> dict[int, dict[str, Any]]:
    """Scores over all depths, by segments."""
    found = results["passkey"]["by_length"] if results["passkey"] else []
    return {scores["segments"]: scores for scores in found if scores["control"] == control}


def doubling_spans(segments: int) -> list[tuple[int, int]]:
    """Segments in spans that double: [0, 1), [1, 2), [2, 4), ... [first, last)."""
    spans, first, last = [], 0, 1
    while first < segments:
        spans.append((first, min(last, segments)))
        first, last = last, 2 * last
    return spans


def span_name(span: tuple[int, int]) -> str:
    """`0`, `2-3`, `4-7`."""
    return str(span[0]) if span[1] - span[0] == 1 else f"{span[0]}-{span[1] - 1}"


def mean_over(by_segment: Sequence[float | None], tokens: Sequence[int], span: tuple[int, int | None]) -> float | None:
    """The mean over the tokens of some segments; None where nothing is known."""
    pairs = [(loss, n) for loss, n in zip(by_segment[slice(*span)], tokens[slice(*span)], strict=True) if n]
    if any(loss is None for loss, _ in pairs) or not pairs:
        return None
    return sum(loss * n for loss, n in pairs) / sum(n for _, n in pairs)


def scalars(results: Results) -> dict[str, float]:
    """The main numbers under the names they have in TensorBoard."""
    values = {}
    for name, (_, facts) in sets_by_name(results).items():
        for way, numbers in facts["ways"].items():
            values[loss_metric(name, way)] = numbers["loss"]
            for span in doubling_spans(len(facts["by_segment_tokens"])):
                found = mean_over(numbers["by_segment"], facts["by_segment_tokens"], span)
                values[f"evaluation/{name}/loss_by_segment_{way}/{span_name(span)}"] = found
    if results["passkey"]:
        for control in results["passkey"]["controls"]:
            for segments, scores in by_length(results, control).items():
                values[f"evaluation/passkey_{control}/segments_{segments}"] = scores["exact_match"]
    for facts in results["tasks"].values():
        for cell in facts["cells"]:
            name = f"evaluation/task_{cell['control']}/{facts['task']} {label(cell['settings'])}"
            values[name] = cell["exact_match"]
    return {name: value for name, value in values.items() if value is not None}
