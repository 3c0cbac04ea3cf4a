"""What a run does with its logits, in words."""

from __future__ import annotations

from pipeline.config.derived import logits_bytes, recomputes_logits
from pipeline.config.schema import Config
from pipeline.reporting.console import format_bytes


def told_logits(config: Config, world_size: int, vocab: int) -> str:
    """Whether they are kept for the backward pass, what they take, and who has decided that."""
    size = format_bytes(logits_bytes(config, world_size, vocab))
    why = "by their size" if config.bptt.recompute_logits is None else "bptt.recompute_logits"
    if recomputes_logits(config, world_size, vocab):
        return f"made again in the backward pass, a third more work in the output matrix, instead of {size} ({why})"
    return f"kept for the backward pass, {size} on a rank of the last stage ({why})"
