"""The learning-rate schedule, a pure function of the step."""

from __future__ import annotations

import math

from pipeline.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of step number `step`, counted from 0.

    Linear warm-up, then `cosine` or `linear` down to `min_lr_ratio`, `constant`, or `wsd` (warm-up, stable, decay:
    constant until the last `decay_steps`, then linear down to `min_lr_ratio`).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    start, length = config.warmup_steps, total_steps - config.warmup_steps
    if config.schedule == "wsd":
        length = config.decay_steps or max(1, total_steps // 5)
        start = total_steps - length
    progress = min(1.0, max(0.0, (step - start) / max(1, length)))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)
