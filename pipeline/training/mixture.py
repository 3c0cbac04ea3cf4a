"""The mixture of sets as it was asked for and as it is seen, as metrics."""

from __future__ import annotations

from collections.abc import Sequence

from data.lanes.loader import SetShare
from pipeline.reporting.set_names import set_names


def mixture_metrics(shares: Sequence[SetShare], tokens: Sequence[float]) -> dict[str, float]:
    """Shares and epochs of each set.

    Args:
        shares: of the sets; what they have given one process is not looked at.
        tokens: that each of them has given all processes together.
    """
    values, total = {}, sum(tokens)
    for name, share, seen in zip(set_names([share.path for share in shares]), shares, tokens, strict=True):
        values[f"data/share/{name}"] = seen / total if total else 0.0
        values[f"data/asked_share/{name}"] = share.asked
        values[f"data/epochs/{name}"] = seen / share.epoch_tokens
    return values
