"""Can this configuration run? Every rule is checked before anything starts; broken ones are reported together."""

from __future__ import annotations

import importlib.util
import math
import operator
import os
from collections.abc import Collection, Iterator, Sequence

from data.files import StorePath, is_store, place
from model.config import (
    BACKENDS,
    FLEX_HEADS,
    KERNELS,
    LOCAL_CONTEXTS,
    MIX_GATES,
    PACKED_ATTENTIONS,
    QK_INITS,
    ROPE_SCALINGS,
    WRITE_GATES,
    MemoryConfig,
    layer_shape,
)
from model.rules import RULES, has_convolution
from model.rules.kernel import RULES_WITH_KERNELS
from pipeline.config import derived
from pipeline.config.bounds import PARAMETERS, TOKENS_PER_STEP, out_of_bounds
from pipeline.config.layout import divisors, lane_problems, layout_problems, listed, window_problems
from pipeline.config.load import ConfigError
from pipeline.config.schema import (
    GRADIENTS,
    LR_SCHEDULES,
    PRECISIONS,
    RECOMPUTE,
    SCHEDULES,
    SPIKE_ACTIONS,
    STOP_SIGNALS,
    WANDB_MODES,
    Config,
)
from pipeline.config.task_spec import Task

CHOICES: dict[str, Collection[str]] = {
    "model.memory.rule": RULES,
    "model.memory.write_gate": WRITE_GATES,
    "model.memory.mix_gate": MIX_GATES,
    "model.memory.kernel": KERNELS,
    "model.backend": BACKENDS,
    "model.packed_attention": PACKED_ATTENTIONS,
    "model.qk_init": QK_INITS,
    "model.local_context": LOCAL_CONTEXTS,
    "model.rope_scaling.type": ROPE_SCALINGS,
    "parallel.schedule": SCHEDULES,
    "bptt.gradient": GRADIENTS,
    "bptt.recompute": RECOMPUTE,
    "optimizer.schedule": LR_SCHEDULES,
    "train.precision": PRECISIONS,
    "resilience.spike_action": SPIKE_ACTIONS,
    "resilience.stop_signal": STOP_SIGNALS,
    "metrics.wandb.mode": WANDB_MODES,
}
"""Texts that a setting may be."""

RUN_FILES = ("checkpoints", "config.yaml", "console.log", "evaluation", "metrics.jsonl", "profile", "tensorboard")
RUN_FILES += ("tokenizer", "wandb", "wandb_run_id")
"""What a run folder holds."""


def validate(
    config: Config,
    world_size: int | None = None,
    *,
    data_exists: bool = True,
    file: str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Refuse a configuration that cannot run.

    Args:
        config: the configuration to check.
        world_size: number of processes; None leaves out what depends on it.
        data_exists: also ask for data sets with a manifest on disk; False for planning without data.
        file: where the configuration comes from, for messages.
        overrides: the `key=value` that won over it.

    Raises:
        ConfigError: names every setting that is wrong and what would be valid.
    """
    problems = [*_numbers(config), *_choices(config)]
    if not problems:  # the rules below divide by these numbers
        problems += [
            *_model(config),
            *layout_problems(config),
            *window_problems(config),
            *_optimizer(config),
            *_memory(config),
            *_packed_attention(config),
        ]
        problems += [*_profile(config, world_size)]
        problems += (
            [*lane_problems(config, world_size), *_timeouts(config, world_size)] if world_size is not None else []
        )
    problems += [*_totals(config)] if not problems else []
    problems += [*_data(config), *_wandb(config)] if data_exists else []
    if problems:
        raise ConfigError([_source(problem, file, overrides) + problem for problem in problems])


def _source(problem: str, file: str | os.PathLike | None, overrides: Sequence[str]) -> str:
    """Where the setting stands that a problem begins with."""
    given = [override.partition("=")[0] for override in overrides]
    if any(problem.startswith((f"{key} ", f"{key}.")) for key in given):
        return "command line: "
    return f"{file}: " if file is not None else ""


def _numbers(config: Config) -> Iterator[str]:
    yield from out_of_bounds(config)
    evaluate = config.evaluate
    for name, specs in (("tasks", evaluate.tasks), ("interval_tasks", evaluate.interval_tasks or [])):
        for i, spec in enumerate(specs):
            try:
                Task.parse(spec)
            except ValueError as error:
                yield f"evaluate.{name}.{i} = {error}"
    if evaluate.interval is not None and evaluate.interval > config.train.steps:
        yield (
            f"evaluate.interval = {evaluate.interval}: must be at most train.steps = {config.train.steps}; null never "
            "evaluates inside the run"
        )
    for i, row in enumerate(config.evaluate.passkey_grid):
        for name in ("lengths", "depths"):
            if not getattr(row, name):
                yield f"evaluate.passkey_grid.{i}.{name} is empty: give at least one"
        for j, length in enumerate(row.lengths):
            if length < config.model.segment_length:
                yield (
                    f"evaluate.passkey_grid.{i}.lengths.{j} = {length}: must be at least a segment, "
                    f"model.segment_length = {config.model.segment_length} tokens"
                )
    if len(config.optimizer.betas) != 2:
        yield f"optimizer.betas = {config.optimizer.betas}: must be two numbers"


def _totals(config: Config) -> Iterator[str]:
    """Sizes that are sound one by one can still be too large together."""
    train, model = config.train, config.model
    tokens = train.lanes * (train.segments_per_window + train.probes_per_window) * model.segment_length
    if tokens > TOKENS_PER_STEP:
        yield (
            f"train.lanes = {train.lanes} x train.segments_per_window = {train.segments_per_window} (and the probes) x "
            f"model.segment_length = {model.segment_length}: {tokens:,} tokens per step; must be at most "
            f"{TOKENS_PER_STEP:,}"
        )
    _, heads, groups, dim = layer_shape(model)
    layer = model.hidden_size * (2 * dim * (heads + groups) + 3 * model.ffn_hidden_size)
    parameters = model.num_layers * layer + model.hidden_size * (model.vocab_size or 0)
    if parameters > PARAMETERS:
        yield (
            f"model: {parameters:,} parameters in matrices, of model.num_layers = {model.num_layers}, "
            f"model.hidden_size = {model.hidden_size}, model.ffn_hidden_size = {model.ffn_hidden_size} "
            f"and so on; must be at most {PARAMETERS:,}"
        )


def _choices(config: Config) -> Iterator[str]:
    for key, valid in CHOICES.items():
        value = operator.attrgetter(key)(config)
        if value not in valid:
            yield f"{key} = {value}: must be one of {', '.join(valid)}"
    zero = config.parallel.zero_stage
    if zero == 0:
        yield (
            "parallel.zero_stage = 0: must be 1, 2 or 3; DeepSpeed cannot coalesce a step's gradients without ZeRO, "
            "and on a single data-parallel rank stage 1 costs nothing"
        )
    elif zero not in (1, 2, 3):
        yield f"parallel.zero_stage = {zero}: must be 1, 2 or 3"
    for key, text in (("name", config.name), ("run_dir", config.run_dir)):
        if not text.strip():
            yield f"{key} is empty: it must be a name"
        if is_store(text):
            yield (
                f"{key} = {text}: a run writes to a disk, which an object store is not; checkpoint.store copies its "
                "checkpoints to one"
            )
    if config.checkpoint.store is not None:
        try:
            StorePath(config.checkpoint.store)
        except ValueError as error:
            yield f"checkpoint.store = {config.checkpoint.store}: {error}"
    stop = config.resilience.stop_file
    if not stop or "/" in stop or stop in (".", "..", *RUN_FILES):
        yield (
            f"resilience.stop_file = {stop}: must be the name of a file in the run folder (it is removed when it "
            f"appears), none of {', '.join(RUN_FILES)}"
        )


def _model(config: Config) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    _, heads, groups, dim = layer_shape(model)
    if heads % groups:
        yield (
            f"model.num_query_groups = {groups}: must divide model.num_attention_heads = {heads}; "
            f"valid are {listed(divisors(heads))}"
        )
    if model.kv_channels is None and model.hidden_size % heads:
        yield (
            f"model.num_attention_heads = {heads}: must divide model.hidden_size = {model.hidden_size}, or "
            f"model.kv_channels must give the dimension of a head; valid are {listed(divisors(model.hidden_size))}"
        )
    elif dim % 2:
        yield (
            f"{'model.hidden_size / model.num_attention_heads' if model.kv_channels is None else 'model.kv_channels'}"
            f" = {dim}: the dimension of a head must be even, rotary embeddings turn it in pairs"
        )
    rope = model.rope_scaling
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if getattr(rope, low) >= getattr(rope, high):
            yield (
                f"model.rope_scaling.{low} = {getattr(rope, low)}: must be less than model.rope_scaling.{high} = "
                f"{getattr(rope, high)}"
            )
    if model.sliding_window is not None and model.segment_length > model.sliding_window:
        yield (
            f"model.segment_length = {model.segment_length}: must be at most model.sliding_window = "
            f"{model.sliding_window}, what the imported model's attention saw (null: let it see more)"
        )
    if model.sliding_layers is not None:
        valid = set(range(model.num_layers))
        if model.sliding_window is None or not set(model.sliding_layers) <= valid:
            yield (
                f"model.sliding_layers = {model.sliding_layers}: must be null without model.sliding_window, and name "
                f"layers from 0 to {model.num_layers - 1}"
            )
    if heads % tensor or groups % tensor:
        what = f"model.num_attention_heads = {heads} and model.num_query_groups = {groups}"
        yield (
            f"parallel.tensor = {tensor}: must divide {what}, because a rank owns whole heads and their memory; "
            f"valid are {listed(divisors(math.gcd(heads, groups)))}"
        )
    if model.ffn_hidden_size % tensor:
        yield f"model.ffn_hidden_size = {model.ffn_hidden_size}: must be a multiple of parallel.tensor = {tensor}"
    if model.vocab_size_multiple % tensor:
        multiple = model.vocab_size_multiple
        yield f"model.vocab_size_multiple = {multiple}: must be a multiple of parallel.tensor = {tensor}"


def _optimizer(config: Config) -> Iterator[str]:
    optimizer, steps = config.optimizer, config.train.steps
    if optimizer.warmup_steps >= steps:
        yield f"optimizer.warmup_steps = {optimizer.warmup_steps}: must be less than train.steps = {steps}"
    elif optimizer.decay_steps is not None:
        if optimizer.schedule != "wsd":
            yield (
                f"optimizer.decay_steps = {optimizer.decay_steps}: must be null with optimizer.schedule = "
                f"{optimizer.schedule}; only wsd uses it"
            )
        elif optimizer.warmup_steps + optimizer.decay_steps > steps:
            yield (
                f"optimizer.decay_steps = {optimizer.decay_steps}: must be at most {steps - optimizer.warmup_steps}, "
                f"what optimizer.warmup_steps = {optimizer.warmup_steps} leaves of train.steps = {steps}"
            )


def _memory(config: Config) -> Iterator[str]:
    memory, layers = config.model.memory, config.model.num_layers
    if memory.layers is not None:
        given = f"model.memory.layers = {memory.layers}"
        beyond = sorted(set(memory.layers) - set(range(layers)))
        if memory.rule == "none":
            yield f"{given}: must be null with model.memory.rule = none, no layer has a memory"
        if not memory.layers:
            yield f"{given}: names no layer; model.memory.rule = none is the model without a memory"
        if beyond:
            yield f"{given}: there is no layer {beyond[0]}, model.num_layers = {layers} are numbered 0 to {layers - 1}"
        if len(set(memory.layers)) < len(memory.layers):
            yield f"{given}: must name every layer once"
    if memory.rule == "none" and memory.mix_gate != "head":
        yield (
            f"model.memory.mix_gate = {memory.mix_gate}: must be head with model.memory.rule = none, "
            "there is nothing to mix in"
        )
    if memory.rule == "none" and memory.write_gate != "none":
        yield (
            f"model.memory.write_gate = {memory.write_gate}: must be none with model.memory.rule = none, "
            "there is nothing to write to"
        )
    if memory.rule == "none" and memory.short_convolution:
        yield (
            "model.memory.short_convolution = true: must be null or false with model.memory.rule = none, there is "
            "nothing to convolve for"
        )
    if memory.convolution_width != MemoryConfig().convolution_width and not has_convolution(memory):
        convolved = "null" if memory.short_convolution is None else "false"
        yield (
            f"model.memory.convolution_width = {memory.convolution_width}: must be "
            f"{MemoryConfig().convolution_width}, its default, with model.memory.short_convolution = {convolved} and "
            f"model.memory.rule = {memory.rule}, which has no short convolutions then"
        )
    if memory.num_householder != MemoryConfig().num_householder and memory.rule != "delta_product":
        yield (
            f"model.memory.num_householder = {memory.num_householder}: must be {MemoryConfig().num_householder}, its "
            f"default, with model.memory.rule = {memory.rule}; delta_product alone takes several steps per token"
        )
    if memory.kernel == "fla" and memory.rule not in RULES_WITH_KERNELS:
        yield (
            f"model.memory.kernel = fla: must be auto or torch with model.memory.rule = {memory.rule}; "
            f"flash-linear-attention writes {', '.join(RULES_WITH_KERNELS)}"
        )
    elif memory.kernel == "fla" and config.train.precision != "bf16":
        yield (
            f"model.memory.kernel = fla: must be auto or torch with train.precision = {config.train.precision}, its "
            "products are bfloat16"
        )
    if memory.write_gate == "none" and config.train.write_gate_penalty:
        gates = " or ".join(gate for gate in WRITE_GATES if gate != "none")
        yield (
            f"train.write_gate_penalty = {config.train.write_gate_penalty}: must be 0 without a write gate, or "
            f"model.memory.write_gate must be {gates}"
        )

    if memory.rule == "none" and config.train.freeze_backbone_steps:
        yield (
            f"train.freeze_backbone_steps = {config.train.freeze_backbone_steps}: must be 0 with "
            "model.memory.rule = none, nothing would train"
        )


def _packed_attention(config: Config) -> Iterator[str]:
    if config.model.packed_attention != "flex":
        return
    given, dim = "model.packed_attention = flex: must be auto with", layer_shape(config.model).dim
    if not config.data.packing:
        yield f"{given} data.packing = false, no documents share a segment"
    if config.train.precision == "fp64":
        yield f"{given} train.precision = fp64, its kernels have no float64"
    if dim not in FLEX_HEADS:
        yield (
            f"{given} heads of {dim} numbers (model.kv_channels, or model.hidden_size / model.num_attention_heads); "
            f"FlexAttention is given {FLEX_HEADS[0]} to {FLEX_HEADS[-1]}"
        )


def _profile(config: Config, world_size: int | None) -> Iterator[str]:
    profile, steps = config.metrics.profile, config.train.steps
    if profile.start is None:
        return
    if profile.start + profile.steps - 1 > steps:
        yield (
            f"metrics.profile.start = {profile.start} with metrics.profile.steps = {profile.steps}: the trace would "
            f"end with step {profile.start + profile.steps - 1}, but train.steps = {steps}"
        )
    if not profile.ranks:
        yield "metrics.profile.ranks is empty: name at least one rank, or set metrics.profile.start = null"
    if world_size is not None and (beyond := [rank for rank in profile.ranks if rank >= world_size]):
        yield (
            f"metrics.profile.ranks = {profile.ranks}: there is no rank {beyond[0]}, {world_size} process(es) are "
            f"numbered from 0 to {world_size - 1}"
        )


def _wandb(config: Config) -> Iterator[str]:
    if config.metrics.wandb.project is None:
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder of that name, which W&B makes, is no package
        yield (
            f"metrics.wandb.project = {config.metrics.wandb.project}: the package wandb is not installed "
            "(pip install 'infini-pretrain[wandb]', or leave the project out)"
        )


def _timeouts(config: Config, world_size: int) -> Iterator[str]:
    hang, collective = config.resilience.hang_timeout_s, config.parallel.timeout_s
    if world_size > 1 and hang > derived.longest_hang_s(config):  # a process alone waits for nobody
        yield (
            f"resilience.hang_timeout_s = {hang:g} with parallel.timeout_s = {collective:g}: a collective would give "
            "up before the watchdog can say which ranks hang; hang_timeout_s must be at most nine tenths of timeout_s "
            "(0 turns the watchdog off)"
        )


def _data(config: Config) -> Iterator[str]:
    if not config.data.sets:
        yield "data.sets is empty: name at least one prepared set (`infini prepare SOURCE... --out DIR` makes one)"
    for i, prepared in enumerate(config.data.sets):
        if not (place(prepared.path) / "manifest.json").is_file():
            yield (
                f"data.sets.{i}.path = {prepared.path}: no prepared set there (manifest.json is missing); "
                f"make it with `infini prepare SOURCE... --out {prepared.path}`"
            )
