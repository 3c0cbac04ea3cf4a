"""The range of every number of a configuration, in one table, looked at before anything is built.

The upper ends are far above what anybody trains. They are there because a size that was mistyped, or comes from a
stranger's checkpoint, would otherwise fill the memory or the afternoon before anything is said.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data.files import shown

Number = int | float

COUNT = 1_000_000_000
"""Steps, and what is counted in them."""
TOKENS_PER_STEP = 1 << 32
"""The largest published batches have 2^26 tokens."""
PARAMETERS = 10**13
"""The largest published models have 2 x 10^12."""


@dataclass(frozen=True)
class Bound:
    """Numbers from `low` to `high`."""

    low: Number
    high: Number
    above: bool = False
    """`low` itself is left out."""
    below: bool = False
    """`high` itself is left out."""

    def problem(self, value: Number) -> str | None:
        """What `value` must be, or None when it is."""
        too_small = not (value > self.low if self.above else value >= self.low)  # NaN, too
        too_large = value >= self.high if self.below else value > self.high
        if not (too_small or too_large):
            return None
        if self.high == 1 and not self.above:
            return "must be at least 0 and below 1" if self.below else "must be between 0 and 1"
        if too_large:
            return f"must be at most {_shown(self.high)}"
        return f"must be {'greater than' if self.above else 'at least'} {_shown(self.low)}"

    def __str__(self) -> str:
        low = f"above {_shown(self.low)}" if self.above else f"{_shown(self.low)}"
        return f"{low} {'and below' if self.below else 'to'} {_shown(self.high)}"


def _positive(high: Number) -> Bound:
    return Bound(0, high, above=True)


_SIZE = Bound(1, 1 << 20)
_SHARE = Bound(0, 1)
_STEPS = Bound(0, COUNT)
_SOME_STEPS = Bound(1, COUNT)
_SCALE = Bound(0, 1_000_000)

BOUNDS: dict[str, Bound] = {
    "model.num_layers": Bound(1, 2048),
    "model.hidden_size": Bound(1, 1 << 17),
    "model.num_attention_heads": Bound(1, 1 << 14),
    "model.num_query_groups": Bound(1, 1 << 14),
    "model.kv_channels": Bound(1, 1 << 14),
    "model.ffn_hidden_size": _SIZE,
    "model.vocab_size": Bound(1, 1 << 24),
    "model.vocab_size_multiple": Bound(1, 1 << 16),
    "model.segment_length": _SIZE,
    "model.sliding_window": Bound(1, 1 << 32),
    "model.sliding_layers.*": Bound(0, 2047),
    "model.rope_base": _positive(1e15),
    "model.rope_scaling.factor": _positive(1e6),
    "model.rope_scaling.original_max_position_embeddings": Bound(1, 1 << 32),
    "model.rope_scaling.low_freq_factor": _positive(1e6),
    "model.rope_scaling.high_freq_factor": _positive(1e6),
    "model.rope_scaling.beta_fast": _positive(1e6),
    "model.rope_scaling.beta_slow": _positive(1e6),
    "model.rope_scaling.attention_factor": _positive(1e6),
    "model.norm_epsilon": Bound(0, 1, above=True),
    "model.init_std": _positive(1000),
    "model.memory.layers.*": Bound(0, 2047),
    "model.memory.convolution_width": Bound(2, 16),
    "model.memory.num_householder": Bound(1, 64),
    "model.memory.write_gate_bias": Bound(-10_000, 10_000),
    "model.memory.beta_init": Bound(-10_000, 10_000),
    "model.memory.gate_floor": Bound(0, 1, below=True),
    "model.memory.epsilon": Bound(0, 1, above=True),
    "data.sets.*.weight": _positive(1e9),
    "data.sets.*.max_epochs": Bound(1, 1 << 31),
    "data.sets.*.answer_weight": Bound(0, 1e9),
    "data.prefetch": Bound(1, 1024),
    "parallel.tensor": Bound(1, 1024),
    "parallel.context": Bound(1, 1 << 16),
    "parallel.pipeline": Bound(1, 2048),
    "parallel.layers_per_stage.*": Bound(1, 2048),
    "parallel.timeout_s": _positive(1e7),
    "bptt.chunks_per_window": Bound(1, 1 << 16),
    "optimizer.lr": _positive(1000),
    "optimizer.betas.*": Bound(0, 1, below=True),
    "optimizer.eps": Bound(0, 1, above=True),
    "optimizer.weight_decay": Bound(0, 1000),
    "optimizer.clip": Bound(0, 1e9),
    "optimizer.beta_lr_scale": _SCALE,
    "optimizer.write_gate_lr_scale": _SCALE,
    "optimizer.warmup_steps": _STEPS,
    "optimizer.decay_steps": _SOME_STEPS,
    "optimizer.min_lr_ratio": _SHARE,
    "train.steps": _SOME_STEPS,
    "train.lanes": _SIZE,
    "train.lanes_per_microbatch": _SIZE,
    "train.segments_per_window": Bound(1, 1 << 16),
    "train.probes_per_window": Bound(0, 1 << 16),
    "train.seed": Bound(0, (1 << 63) - 1),
    "train.write_gate_penalty": _SCALE,
    "train.write_gate_penalty_from": _STEPS,
    "train.freeze_backbone_steps": _STEPS,
    "train.max_nonfinite_steps": _SOME_STEPS,
    "checkpoint.interval": _STEPS,
    "checkpoint.keep": _SOME_STEPS,
    "checkpoint.keep_every": _STEPS,
    "checkpoint.attempts": _SOME_STEPS,
    "resilience.max_minutes": _positive(1e7),
    "resilience.hang_timeout_s": Bound(0, 1e7),
    "resilience.spike_threshold": _positive(1e9),
    "resilience.spike_window": Bound(1, 1_000_000),
    "resilience.max_rollbacks": _STEPS,
    "metrics.interval": _SOME_STEPS,
    "metrics.memory_interval": _SOME_STEPS,
    "metrics.straggler_bound": Bound(1, 1e6),
    "metrics.profile.start": _SOME_STEPS,
    "metrics.profile.steps": Bound(1, 1000),
    "metrics.profile.ranks.*": Bound(0, 1_000_000),
    "evaluate.interval": _SOME_STEPS,
    "evaluate.documents": Bound(0, 1_000_000),
    "evaluate.reset_every": _SIZE,
    "evaluate.max_segments": _SIZE,
    "evaluate.passkey_lengths.*": _SIZE,
    "evaluate.passkey_depths.*": _SHARE,
    "evaluate.passkey_documents": Bound(1, 1_000_000),
    "evaluate.passkey_grid.*.lengths.*": Bound(1, 1 << 40),
    "evaluate.passkey_grid.*.depths.*": _SHARE,
    "evaluate.passkey_grid.*.documents": Bound(1, 1_000_000),
    "evaluate.passkey_grid.*.seeds": Bound(1, 10_000),
    "evaluate.seed": Bound(0, 1 << 62),
}
"""By key; `*` stands for the number of a list's item. `parallel.zero_stage` is a choice: `pipeline.config.validate`."""


def numbers(section: Any, prefix: str = "") -> Iterator[tuple[str, Number]]:
    """Every number of a configuration with its key; settings that are null have none."""
    if dataclasses.is_dataclass(section):
        for field in dataclasses.fields(section):
            name = f"{prefix}.{field.name}" if prefix else field.name
            yield from numbers(getattr(section, field.name), name)
    elif isinstance(section, list):
        for i, item in enumerate(section):
            yield from numbers(item, f"{prefix}.{i}")
    elif isinstance(section, int | float) and not isinstance(section, bool):
        yield prefix, section


def out_of_bounds(config: Any) -> Iterator[str]:
    """A sentence for each number outside of its range."""
    for key, value in numbers(config):
        bound = BOUNDS.get(re.sub(r"\.\d+", ".*", key))
        if bound is not None and (problem := bound.problem(value)):
            yield f"{key} = {shown(value)}: {problem}"


def _shown(number: Number) -> str:
    if isinstance(number, int) or math.isinf(number) or number >= 1e16:
        return f"{number:,}"
    return f"{number:,.0f}" if number == int(number) else f"{number:g}"
