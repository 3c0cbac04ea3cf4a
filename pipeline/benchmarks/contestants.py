"""What `infini bench step` runs: this model with every rule, and what it is measured against, all of the same sizes.

Every contestant does the same work: forward and backward through a window of random tokens and a loss on each, all of
the window in one graph; gradients add up in the parameters. The optimizer is left out, it is the same for all.

The others are packages that may be installed or not; none of them is needed for anything else.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.accounting.flops import train_flops_per_token
from pipeline.benchmarks.repeated_step import Step, random_batch
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.config.validate import validate
from pipeline.parallel.topology import Topology
from pipeline.training.batches import to_device

PLAIN = "plain"
"""This model without a memory: the same code with `memory.rule=none`."""
PRODUCTS = "matrix products"
"""The products with the weight matrices alone: the machine's own peak at these shapes."""


class Sizes(NamedTuple):
    """Of every contestant's model, and of the window."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    tokens: int
    """Of the window, in each lane."""
    lanes: int
    segment_length: int


@dataclass(frozen=True)
class Contestant:
    """One model, ready to run."""

    name: str
    package: str | None
    """With its version; None for our own."""
    parameters: int
    train_flops: float
    """Of forward and backward of the window, by the conventions of `pipeline.accounting.flops`."""
    run: Callable[[], object]


class Built(NamedTuple):
    """A peer's model and how it runs the window once."""

    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    """Mean loss of `[b, tokens + 1]`; everything behind it is in one graph."""


def own_config(sizes: Sizes, rule: str, precision: str, settings: list[str]) -> Config:
    """This model's configuration for a rule (`plain` for none).

    Args:
        settings: `key=value`, which win.

    Raises:
        ConfigError: they do not fit together.
    """
    config = load_config(
        None,
        [
            f"model.num_layers={sizes.layers}",
            f"model.hidden_size={sizes.hidden}",
            f"model.num_attention_heads={sizes.heads}",
            f"model.ffn_hidden_size={sizes.ffn}",
            f"model.vocab_size={sizes.vocab}",
            "model.tie_embeddings=false",
            f"model.segment_length={sizes.segment_length}",
            f"model.memory.rule={'none' if rule == PLAIN else rule}",
            f"train.lanes={sizes.lanes}",
            f"train.segments_per_window={sizes.tokens // sizes.segment_length}",
            f"train.precision={precision}",
            *settings,
        ],
    )
    validate(config, data_exists=False, overrides=settings)
    return config


def own_model(name: str, config: Config, topology: Topology) -> Contestant:
    """This model on one process, run by the executor that the trainer uses."""
    step = Step(config, topology)
    batch = to_device(random_batch(config), topology.device)
    return Contestant(
        name=name,
        package=None,
        parameters=sum(parameter.numel() for parameter in step.stage.parameters()),
        train_flops=train_flops_per_token(config.model) * batch.tokens.numel(),
        run=lambda: step.run(batch, config),
    )


def weight_products(
    name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, mm: Callable[..., Tensor]
) -> Contestant:
    """The products with the weight matrices of forward and backward, and nothing else: each layer's four and the
    output, of the window's tokens with the matrix, of the gradient with it, and of the gradient with the input.

    Args:
        mm: what makes them (`model.backend.matrix_product`).
    """
    rows = sizes.tokens * sizes.lanes
    shapes = [(sizes.hidden, 3 * sizes.hidden), (sizes.hidden, sizes.hidden)]
    shapes += [(sizes.hidden, 2 * sizes.ffn), (sizes.ffn, sizes.hidden)]
    shapes = shapes * sizes.layers + [(sizes.hidden, sizes.vocab)]
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device, dtype)

    inputs = {width: matrix(rows, width) for width in {n for shape in shapes for n in shape}}
    # A matrix of its own for every product: the processor's caches must not keep what a model's would not.
    weights = [matrix(wide, narrow) for narrow, wide in shapes]

    def run() -> None:
        for (narrow, wide), weight in zip(shapes, weights, strict=True):
            mm(inputs[narrow], weight.t())
            mm(inputs[wide], weight)
            mm(inputs[wide].t(), inputs[narrow])

    flops = 6 * rows * sum(narrow * wide for narrow, wide in shapes)
    return Contestant(name, None, sum(weight.numel() for weight in weights), flops, run)


def llama(sizes: Sizes, dtype: torch.dtype) -> Built:
    """The plain transformer that most people train: every token sees all before it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.tokens,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(dtype)

    def loss(text: Tensor) -> Tensor:
        return F.cross_entropy(model(text[:, :-1]).logits.flatten(0, 1).float(), text[:, 1:].flatten())

    return Built(model, loss)


def _infini_transformer(sizes: Sizes, dtype: torch.dtype) -> Built:
    """The same memory (delta rule), segment after segment in a loop."""
    from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

    model = InfiniTransformer(
        num_tokens=sizes.vocab,
        dim=sizes.hidden,
        depth=sizes.layers,
        dim_head=sizes.hidden // sizes.heads,
        heads=sizes.heads,
        ff_mult=(sizes.ffn + 0.5) * 3 / (2 * sizes.hidden),  # it takes int(ff_mult * dim * 2 / 3)
        use_mem_delta_rule=True,
    )
    segments = sizes.tokens // sizes.segment_length
    # Memories are detached after the last segment only: the graph is that of the whole window, as in all others.
    wrapper = InfiniTransformerWrapper(model, sizes.segment_length, detach_mems_every_num_segments=segments)
    return Built(model.to(dtype), wrapper)


def _recurrent_memory_transformer(sizes: Sizes, dtype: torch.dtype) -> Built:
    """Another memory: tokens that a segment writes for the next one."""
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper

    model = RecurrentMemoryTransformer(
        dim=sizes.hidden,
        num_tokens=sizes.vocab,
        depth=sizes.layers,
        num_memory_tokens=MEMORY_TOKENS,
        seq_len=sizes.segment_length,
        dim_head=sizes.hidden // sizes.heads,
        heads=sizes.heads,
        ff_mult=(sizes.ffn + 0.5) * 3 / (2 * sizes.hidden),
        use_flash_attn=True,
        abs_pos_emb=False,
        rotary_pos_emb=True,
        use_xl_memories=False,
        num_residual_streams=1,
    ).to(dtype)
    wrapper = RecurrentMemoryTransformerWrapper(model)
    return Built(model, lambda text: wrapper(text, return_loss=True)[0])


MEMORY_TOKENS = 16
"""Of the recurrent memory transformer, as in its readme's larger example."""


@dataclass(frozen=True)
class Peer:
    """Somebody else's model, which runs where its package is installed."""

    module: str
    does: str
    """In words, for the note."""
    build: Callable[[Sizes, torch.dtype], Built]
    flops_as: str
    """Our rule whose arithmetic it does."""
    segmented: bool = True
    """It attends inside segments; else to the whole window."""

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


PEERS = {
    "transformers": Peer(
        "transformers",
        "Llama of transformers (SDPA), full attention over the window",
        llama,
        PLAIN,
        segmented=False,
    ),
    "infini-transformer-pytorch": Peer(
        "infini_transformer_pytorch",
        "Infini-attention with the delta rule, a loop over the segments",
        _infini_transformer,
        "delta",
    ),
    "recurrent-memory-transformer-pytorch": Peer(
        "recurrent_memory_transformer_pytorch",
        f"another memory, {MEMORY_TOKENS} tokens that a segment leaves for the next one; a loop over the segments",
        _recurrent_memory_transformer,
        PLAIN,
    ),
}
"""By the name of the package on PyPI."""


def peer_model(name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Contestant:
    """A peer of `PEERS`, whose package must be installed, on one device."""
    peer = PEERS[name]
    torch.manual_seed(seed)
    built = peer.build(sizes, dtype)
    built.model.to(device).train()
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, sizes.vocab, (sizes.lanes, sizes.tokens + 1), generator=generator).to(device)
    like = sizes if peer.segmented else sizes._replace(segment_length=sizes.tokens)
    config = own_config(like, peer.flops_as, "fp32", [])
    return Contestant(
        name=name,
        package=f"{name} {importlib.metadata.version(name)}",
        parameters=sum(parameter.numel() for parameter in built.model.parameters()),
        train_flops=train_flops_per_token(config.model) * sizes.tokens * sizes.lanes,
        run=lambda: built.loss(text).backward(),
    )
