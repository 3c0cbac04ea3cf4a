"""Bytes that each rank needs, by arithmetic, before anything is built.

Weights. Under bf16 the matrices are bfloat16 and their gradients are summed in float32: 2 + 4 bytes a parameter; what
norms, gates and memory rules own is float32, 4 + 4 bytes, as all parameters are under fp32 (8 + 8 under fp64). The
float32 masters and Adam's two moments, 12 bytes a parameter, are shared out over the ranks that hold the same
parameters, data x context. Gradients are shared out at no ZeRO stage: our schedule feeds them under
`coalesce_grad_reduction`, which keeps them whole to the end of the step, so stage 2 saves nothing over stage 1 here.
Stage 3 shares out the parameters and gathers at least a layer (or embedding) at a time.

Memory state. That of each lane of the rank in the layers of the stage, twice: the one from before a step is kept until
the step is accepted. Context-parallel ranks hold the same states.

Activations. Those of a chunk are in `pipeline.accounting.activations`. Stage i of P holds chunks_per_window + P - 1 - i
chunks (never more than a step has).

The peak. Weights, optimizer and memory state are there all the time. What comes on top is at its most in one of these
moments, and `total` takes the largest (L numbers of the embedding or output matrix on a rank, t tokens of a chunk):

    loss        all live chunks; the gradient of the output matrix: e L for one block of rows, for more of them
                4 L and e L for the block that is added; a block of logits that are made again, 16 MiB of them in
                float32; d(hidden), and under sequence parallelism the gathered hidden states, t h e each
    a layer     all live chunks, but for what the loss kept, and what recomputation holds; the gradient of the layer's
                largest matrix (e a number) and those inside its MLP, (3 f + h) e a token; with `selective` the MLP has
                gone back before attention runs again: the larger of the two; under sequence parallelism a matrix's
                gathered input and its gradient, t h e each
    embedding   the other live chunks, and 4 L
    update      `pipeline.accounting.update_peak`: no activations, but copies of gradients

A tied embedding's first gradient, of the output matrix, waits through all layers for the second; their sum is a third.
Gradients are sums over chunks, and so all there in each of these moments; in a step of a single chunk they come as the
activations go, and what has not gone back yet has none.

Not counted: what a kernel uses only inside itself, the allocator's waste, the batch, and that parameters which
`train.trainable` leaves out have neither gradient nor moments. Held within 10 % of a traced step of every configuration
in `configs/` (`tests/pipeline/tracing/test_plan_against_trace.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import layer_config, layer_kinds, layer_shape
from model.decoder import split_layers
from model.layers.loss import BLOCK_ROWS, WIDE_ELEMENTS
from pipeline.accounting.activations import Chunk, chunk_bytes, lane_state_bytes
from pipeline.accounting.flops import embedding_rows, layer_parameters
from pipeline.accounting.update_peak import Groups, update_peak, zero3_buffers
from pipeline.config.derived import (
    lanes_per_microbatch,
    lanes_per_rank,
    number_bytes,
    replicas,
)
from pipeline.config.schema import Config
from pipeline.schedule.operations import expected_peak_live_chunks

OPTIMIZER_COPIES = 3
"""Of every parameter: the master and Adam's two moments."""


@dataclass(frozen=True)
class RankBytes:
    """What each rank of one pipeline stage holds, in bytes."""

    stage: int
    layers: int
    """Layers of the stage."""
    parameter_count: int
    """Parameters of this rank (its tensor-parallel part of the stage), before ZeRO shares them out."""
    parameters: int
    whole_parameters: int
    """The same before ZeRO 3 shares them out: what is gathered."""
    gradients: int
    """Of all parameters, as the passes sum them up."""
    optimizer: int
    buffers: int
    """What ZeRO 3 keeps for reductions: a bucket, and its share of the sums."""
    memory_state: int
    live_chunks: int
    """Chunks whose activations are held at once, at most."""
    chunk_activations: int
    """What one live chunk keeps for its backward pass."""
    recompute_activations: int
    """What recomputation holds on top, once; 0 without."""
    passes: int
    """Gradients, activations and working space at the worst moment of forward and backward passes."""
    update: int
    """Gradients and their copies at the worst moment of reduction and update."""

    @property
    def activations(self) -> int:
        """All live chunks, and what recomputation holds."""
        return self.live_chunks * self.chunk_activations + self.recompute_activations

    @property
    def held(self) -> int:
        """What is there all the time."""
        return self.parameters + self.optimizer + self.buffers + self.memory_state

    @property
    def total(self) -> int:
        return self.held + max(self.passes, self.update)


def per_rank_bytes(
    config: Config, world_size: int, vocab: int | None = None, *, masked: bool = True
) -> list[RankBytes]:
    """The needs of a rank of every pipeline stage, first to last; the ranks of a stage are alike.

    Args:
        config: a validated configuration.
        world_size: processes of the run.
        vocab: tokens of the tokenizer; None takes `model.vocab_size`.
        masked: documents that share segments are kept apart by a mask, as on an accelerator; a CPU attends to each of
            their pieces by itself (`model.layers.packed_attention`).
    """
    parallel = config.parallel
    bounds = split_layers(config.model.num_layers, parallel.pipeline, parallel.layers_per_stage)
    return [
        _stage_bytes(config, world_size, vocab, stage, range(*layers), masked) for stage, layers in enumerate(bounds)
    ]


def _stage_bytes(
    config: Config, world_size: int, vocab: int | None, stage: int, layers: range, masked: bool
) -> RankBytes:
    model, parallel = config.model, config.parallel
    e = number_bytes(config)
    number = max(e, 4)
    sharers = replicas(config, world_size)

    kinds = [(layer_parameters(kind, parallel.tensor), n) for kind, n in layer_kinds(model, layers)]
    embedding = embedding_rows(model, vocab) * model.hidden_size // parallel.tensor
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    # Tied embeddings on different stages are two copies.
    matrices = is_first + is_last - (is_first and is_last and model.tie_embeddings)
    parameters = sum(n * sum(parts.values()) for parts, n in kinds) + matrices * embedding + is_last * model.hidden_size
    wide = sum(n * _wide(parts) for parts, n in kinds) + is_last * model.hidden_size
    whole = held = parameters * e + wide * (number - e)
    if parallel.zero_stage == 3:
        largest = max(sum(parts.values()) * e + _wide(parts) * (number - e) for parts, _ in kinds)
        held = -(-whole // sharers) + max(largest, embedding * e)

    chunk = chunk_bytes(config, world_size, vocab, layers, is_last, masked=masked)
    live_chunks = expected_peak_live_chunks(
        stages=parallel.pipeline,
        stage=stage,
        microbatches=lanes_per_rank(config, world_size) // lanes_per_microbatch(config, world_size),
        chunks=config.bptt.chunks_per_window,
        replay=False,  # with window recomputation what a live chunk keeps is its input and its memory
    )
    groups = _optimizer_groups(config, layers, embedding, is_first, is_last)
    return RankBytes(
        stage=stage,
        layers=len(layers),
        parameter_count=parameters,
        parameters=held,
        whole_parameters=whole,
        gradients=parameters * number,
        optimizer=-(-parameters // sharers) * OPTIMIZER_COPIES * number,
        buffers=number * zero3_buffers(parameters, sharers) if parallel.zero_stage == 3 else 0,
        memory_state=2 * lanes_per_rank(config, world_size) * lane_state_bytes(config, layers),
        live_chunks=live_chunks,
        chunk_activations=chunk.kept,
        recompute_activations=chunk.once,
        passes=_passes_peak(config, world_size, chunk, live_chunks, embedding, parameters, is_first, is_last),
        update=number * update_peak(groups, sharers, parallel.zero_stage),
    )


def _wide(parts: dict[str, int]) -> int:
    """Of a layer's parameters those that are float32 whatever the precision."""
    return sum(parts[part] for part in ("norms", "beta", "write_gate", "rule"))


def _optimizer_groups(config: Config, layers: range, embedding: int, is_first: bool, is_last: bool) -> Groups:
    """Parameters of a stage by group, in the order of `pipeline.parallel.parameter_groups`; of small ones of a layer
    the sum."""
    model, tensor = config.model, config.parallel.tensor
    of_layers = [layer_parameters(layer_config(model, layer), tensor) for layer in layers]
    mlp = of_layers[0]["mlp"]
    _, heads, groups, dim = layer_shape(model, tensor)
    query_key_value, projection = (model.hidden_size * dim * n for n in (heads + 2 * groups, heads))
    gate_and_up, down = mlp * 2 // 3, mlp // 3
    matrices = len(layers) * (query_key_value, projection, gate_and_up, down)
    if is_first:
        matrices = (embedding, *matrices)
    if is_last and not (is_first and model.tie_embeddings):
        matrices = (*matrices, embedding)
    small = tuple(parts["norms"] + parts["beta"] for parts in of_layers)
    # Biases are part of `attention`.
    late = [parts["write_gate"] + parts["rule"] + parts["attention"] for parts in of_layers]
    late = tuple(number - query_key_value - projection for number in late)
    late = tuple(number for number in late if number)
    # In the order of their first parameters: a layer begins with its norm, and a first stage with the embedding.
    both = (matrices, small) if is_first else (small, matrices)
    return (*both, late) if late else both


def _passes_peak(
    config: Config,
    world_size: int,
    chunk: Chunk,
    live_chunks: int,
    embedding: int,
    parameters: int,
    is_first: bool,
    is_last: bool,
) -> int:
    """The moments `loss`, `a layer` and `embedding` of the module's table."""
    e = number_bytes(config)
    number = max(e, 4)
    tied_here = config.model.tie_embeddings and is_first and is_last
    rows, hidden = chunk.tokens, config.model.hidden_size
    blocks = -(-rows // BLOCK_ROWS)
    of_output = embedding * (e if blocks == 1 else number) if is_last else 0  # as the loss gives it
    single = lanes_per_rank(config, world_size) * config.bptt.chunks_per_window == lanes_per_microbatch(
        config, world_size
    )
    gradients = parameters * number
    live = live_chunks * chunk.kept

    moments = []
    if is_last:
        columns = embedding // hidden
        product = embedding * e if blocks > 1 and e < number else 0
        block = min(rows, BLOCK_ROWS) * columns * e if chunk.logits_again else 0
        wide = min(rows * columns, WIDE_ELEMENTS) * number
        gathered = 2 if config.parallel.sequence_parallel else 1
        moments.append(
            (0 if single else gradients)
            + live
            + (chunk.once if config.bptt.recompute == "window" else 0)
            + of_output
            + product
            + block
            + wide
            + gathered * rows * hidden * e
        )
    waiting = of_output if tied_here else 0  # for the embedding's, and then their sum is a third
    # A single chunk's gradients are not there yet, but for that of the output matrix.
    there = (embedding * number if is_last and not tied_here else 0) if single else gradients
    moments.append(there + waiting + live - chunk.of_loss + chunk.in_layer)
    if is_first:
        own = embedding * number
        others = (live_chunks - 1) * chunk.kept
        moments.append(gradients - (own if single else 0) + others + own + (waiting + own if tied_here else 0))
    return max(moments)
