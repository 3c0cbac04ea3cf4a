"""What the model is: the schema of the `model` section of a run's YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

WRITE_GATES = ("none", "hard", "sigmoid")
MIX_GATES = ("head", "token")
LOCAL_CONTEXTS = ("segment", "sliding")
BACKENDS = ("local", "te", "onednn")
QK_INITS = ("independent", "tied")
KERNELS = ("auto", "torch", "fla")
PACKED_ATTENTIONS = ("auto", "flex")
FLEX_HEADS = range(16, 257)
"""Dimensions of heads that `flex` is given: Triton's products are of at least 16 numbers."""
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")


@dataclass
class MemoryConfig:
    """The compressive memory of the layers that have one (see `model.rules`)."""

    rule: str = "delta"
    """A name in `model.rules.RULES`. `none` gives a plain transformer, the baseline."""
    write_gate: str = "none"
    """`none` writes every token (the paper). `hard` can be exactly zero or one; `sigmoid` is the smooth form."""
    write_gate_bias: float = 2.0
    """Initial bias of the write gate. At +2 the hard gate is exactly 1 everywhere: the paper's rule."""
    layers: list[int] | None = None
    """The layers that have a memory, counted from 0; null means all of them. The others are local attention alone
    (`model.local_context`): they have no gates and carry no memory."""
    short_convolution: bool | None = None
    """Queries, keys and values pass a causal convolution over `convolution_width` tokens on their way to the memory, so
    that a key can hold the tokens before it (see `model.rules.convolution`). null: `gated_deltanet`, `delta_product`,
    `kda` and `gdn2` have them, as in their papers, the others do not."""
    convolution_width: int = 4
    """Tokens that the short convolutions see, their own included: what is stored is bound to so many tokens. Means
    something only with short convolutions (`short_convolution`)."""
    num_householder: int = 2
    """`delta_product`: steps of the delta rule per token, each with a key and a value of its own (see
    `model.rules.delta_product`). 1 is `gated_deltanet`."""
    mix_gate: str = "head"
    """What decides the memory's share of the output, sigmoid(beta): `head`, one beta per query head (the paper), or
    `token`, a linear function of the layer's normalised input per query head."""
    beta_init: float = 0.0
    """Initial value of beta, for every head and token."""
    gate_floor: float = 0.0
    """The share is at least this (and what the sigmoid gives is scaled to the rest), except where the memory is empty
    and `skip_empty` gives it nothing."""
    skip_empty: bool = True
    """Give the local attention all of the output while the memory is empty. `false` is the literal paper."""
    epsilon: float = 1e-6
    """A read whose normaliser phi(q) z is not larger than this gives 0."""
    kernel: str = "auto"
    """What writes `deltanet`, `gated_deltanet` and `delta_product`: `torch`; `fla`, flash-linear-attention's Triton
    kernels (CUDA, train.precision=bf16); `auto`, `fla` where it can be had and `torch` elsewhere. The start of a run
    says which."""


@dataclass
class RopeScalingConfig:
    """Changed rotary frequencies, with the names of Hugging Face's configurations (see `model.layers.rotary`)."""

    type: str = "none"
    """One of `ROPE_SCALINGS`."""
    factor: float = 1.0
    """What frequencies are divided by (`linear`: all; the others: those of long wavelengths)."""
    original_max_position_embeddings: int = 8192
    """`llama3` and `yarn`: the context that the model was first trained with."""
    low_freq_factor: float = 1.0
    """`llama3`: up to so many turns in that context a frequency is divided."""
    high_freq_factor: float = 4.0
    """`llama3`: from so many turns on a frequency is kept."""
    beta_fast: float = 32.0
    """`yarn`: as `high_freq_factor`."""
    beta_slow: float = 1.0
    """`yarn`: as `low_freq_factor`."""
    truncate: bool = True
    """`yarn`: round the ends of the ramp between kept and divided to whole pairs."""
    attention_factor: float | None = None
    """`yarn`: factor of the rotated queries and keys; null means 0.1 ln(factor) + 1."""


@dataclass
class ModelConfig:
    """A Llama-style decoder whose attention is Infini-attention."""

    num_layers: int = 4
    """Layers; each of `memory.layers` has a memory of its own."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_attention_heads: int = 4
    """Query heads of a layer."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); null means one per attention head."""
    kv_channels: int | None = None
    """Dimension of a head; null means hidden_size / num_attention_heads."""
    ffn_hidden_size: int = 344
    """Width of the gated MLP (each of its two input halves)."""
    vocab_size: int | None = None
    """Number of tokens; null takes the tokenizer's from the prepared data."""
    vocab_size_multiple: int = 64
    """The embedding is padded up to a multiple of this, so that it divides by every tensor-parallel size in use."""
    tie_embeddings: bool = True
    """Use the input embedding as output matrix."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen 2)."""
    qk_norm: bool = False
    """Root-mean-square norms of every head's query and key, each with one weight for all heads (Qwen 3)."""
    segment_length: int = 2048
    """Tokens of a segment (S): what the memory is written and read by, and what the local attention sees."""
    local_context: str = "segment"
    """`segment`: the local attention ends at the segment (the paper). `sliding`: it sees the segment before as well,
    whose keys and values are carried like memory; with `memory.rule=none` that is Transformer-XL."""
    sliding_window: int | None = None
    """Of an imported model whose attention slides: the tokens that it saw. A segment is at most as long, and a plain
    export slides again. null: it saw everything before."""
    sliding_layers: list[int] | None = None
    """The layers whose attention slid, counted from 0; null means all of them."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies (`rope_theta` of Hugging Face)."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    norm_epsilon: float = 1e-5
    """What the root-mean-square norms add to the mean square."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections are scaled down by sqrt(2 num_layers)."""
    qk_init: str = "independent"
    """`tied`: keys start as what their head's queries ask for, so that equal tokens match before anything has been
    learnt, in the memory and in the local attention (mimetic initialisation, arXiv 2410.11135). For models from scratch
    that have to recall; nothing ties them in training."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    backend: str = "local"
    """Whose parallel linear layers carry the attention's and the MLP's matrices: `local`, Megatron's own; `te`,
    NVIDIA's Transformer Engine (CUDA); `onednn`, Megatron's own with oneDNN's products in place of MKL's (a CPU,
    train.precision=fp32; see `model.backend`). Parameters, names and checkpoints are the same."""
    compile: bool = False
    """Have PyTorch's compiler make the element-wise pieces of training passes (see `model.compiling`). The function is
    the same; `false` is the reference."""
    packed_attention: str = "auto"
    """How the local attention keeps documents apart that share segments (`data.packing`): `auto`, by a mask on CUDA and
    document by document on a CPU; `flex`, by FlexAttention, which leaves out blocks that a mask hides (CUDA, compiled;
    train.precision=fp32 or bf16)."""


class LayerShape(NamedTuple):
    """Sizes of an attention layer, or of the part of it that a tensor-parallel rank holds."""

    hidden: int
    heads: int
    """Query heads."""
    groups: int
    """Key/value heads."""
    dim: int
    """Of a head."""

    @property
    def ratio(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.groups


def layer_shape(config: ModelConfig, tensor_size: int = 1) -> LayerShape:
    """The attention of `config` on one of `tensor_size` ranks: where null means as many heads as queries have, or
    hidden_size / num_attention_heads, it is resolved here and nowhere else."""
    heads = config.num_attention_heads
    groups = heads if config.num_query_groups is None else config.num_query_groups
    dim = config.hidden_size // heads if config.kv_channels is None else config.kv_channels
    return LayerShape(config.hidden_size, heads // tensor_size, groups // tensor_size, dim)


def layer_config(config: ModelConfig, layer: int) -> ModelConfig:
    """`config` as one layer has it: without a memory where `memory.layers` leaves the layer out."""
    layers = config.memory.layers
    if layers is None:
        return config
    return replace(config, memory=replace(config.memory, layers=None) if layer in layers else MemoryConfig(rule="none"))


def memory_layers(config: ModelConfig) -> list[int]:
    """The layers that have a memory, in order."""
    if config.memory.rule == "none":
        return []
    return list(range(config.num_layers)) if config.memory.layers is None else sorted(config.memory.layers)


def rule_and_layers(config: ModelConfig) -> str:
    """The memory's rule for people, with its layers where they are not all."""
    if config.memory.layers is None:
        return config.memory.rule
    return f"{config.memory.rule} in layers {', '.join(map(str, memory_layers(config)))} of {config.num_layers}"


def layer_kinds(config: ModelConfig, layers: Iterable[int] | None = None) -> list[tuple[ModelConfig, int]]:
    """How many of some layers (null: all) are alike: `layer_config` of those with a memory, then of those without."""
    layers, chosen = list(range(config.num_layers) if layers is None else layers), memory_layers(config)
    kinds = ([layer for layer in layers if (layer in chosen) is has] for has in (True, False))
    return [(layer_config(config, alike[0]), len(alike)) for alike in kinds if alike]


def same_function(config: ModelConfig) -> ModelConfig:
    """`config` without what says only how it is computed, `backend`, `compile`, `packed_attention` and `memory.kernel`,
    and with one way to name the memory's layers: models that differ in nothing else have the same weights and are the
    same function, so a checkpoint goes on with others of these."""
    layers = memory_layers(config)
    layers = None if config.memory.layers is None or len(layers) == config.num_layers else layers
    memory = replace(config.memory, kernel="auto", layers=layers)
    return replace(config, backend="local", compile=False, packed_attention="auto", memory=memory)


def saved_shape(model: Mapping[str, Any]) -> LayerShape:
    """`layer_shape` of a `model` section as the files of a run hold it."""
    names = ("hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    return layer_shape(ModelConfig(**{name: model[name] for name in names}))
