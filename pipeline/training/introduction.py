"""What a run says of itself before its first step: every number that follows from its configuration."""

from __future__ import annotations

import math

import torch.distributed as dist

from model.backend import backend_in_words
from model.compiling import in_words
from model.config import rule_and_layers
from model.device import host_knows, rounds_to_tf32
from model.layers.packed_attention import kept_apart_in_words
from model.precision import COMPUTE_DTYPES
from model.rules.kernel import memory_kernel
from pipeline.accounting.devices import known_as
from pipeline.accounting.flops import parameter_count, train_flops_per_token
from pipeline.accounting.footprint import per_rank_bytes
from pipeline.config import derived
from pipeline.config.schema import Config
from pipeline.parallel.topology import Topology
from pipeline.reporting.logits import told_logits


def derived_rows(
    config: Config, topology: Topology, vocab_size: int, *, peak_flops: float, sheet: str
) -> dict[str, str]:
    """The table's rows.

    Args:
        vocab_size: tokens, without padding.
        peak_flops: per second, measured, all processes.
        sheet: the same by the devices' data sheets, in words.
    """
    train, parallel, model, world = config.train, config.parallel, config.model, dist.get_world_size()
    tokens = derived.tokens_per_step(config)
    count = parameter_count(model, vocab_size)
    flops = train_flops_per_token(model, vocab_size, recompute=config.bptt.recompute)
    ranks = per_rank_bytes(config, world, vocab_size, masked=not host_knows(topology.device))
    largest = max(ranks, key=lambda rank: rank.total)
    lanes_per_rank, per_microbatch = derived.lanes_per_rank(config, world), derived.lanes_per_microbatch(config, world)
    kernel = memory_kernel(model, train.precision, topology.device.type)
    kernels = {} if kernel is None else {"memory is written by": f"{kernel.name} ({kernel.reason})"}
    dtype = COMPUTE_DTYPES[train.precision]
    packed = (
        {"packing": f"documents share segments, {kept_apart_in_words(topology.device, dtype, model.packed_attention)}"}
        if config.data.packing
        else {}
    )
    compiled = (
        {"compiled": f"{in_words(topology.device.type)}; evaluation and generation are not"} if model.compile else {}
    )
    return {
        "layout": f"tensor {parallel.tensor} x context {parallel.context} x pipeline {parallel.pipeline} x data "
        f"{topology.data_size}, "
        f"ZeRO {parallel.zero_stage}, {world} processes on {topology.device.type}",
        "precision": train.precision,
        "memory": f"{rule_and_layers(model)}, write gate {model.memory.write_gate}, mix gate {model.memory.mix_gate}, "
        f"local context {model.local_context}, "
        f"gradient {config.bptt.gradient}, recompute {config.bptt.recompute}",
        **packed,
        **({} if model.backend == "local" else {"linear layers": backend_in_words(model.backend)}),
        **kernels,
        **compiled,
        "logits": told_logits(config, world, vocab_size),
        "parameters": f"{count['total']:,}",
        "tokens per step": f"{tokens:,} = {train.lanes} lanes x {train.segments_per_window} segments x "
        f"{model.segment_length} tokens"
        + (f", and {train.probes_per_window} probes per lane" if train.probes_per_window else ""),
        "microbatches per step and rank": f"{lanes_per_rank // per_microbatch} of "
        f"{per_microbatch} lanes, {config.bptt.chunks_per_window} chunks each",
        "tokens in the run": f"{tokens * train.steps:,} in {train.steps:,} steps",
        "training FLOPs per token": f"{flops:.3e}",
        "matrix-product peak": f"{peak_flops / 1e9:,.1f} GFLOP/s measured, all processes",
        "data-sheet peak": sheet,
        "memory per rank, estimated": f"{largest.total / 2**20:,.1f} MiB (stage {largest.stage})",
        "run folder": config.run_dir,
    }


def told_sheet(name: str | None, flops_per_s: float, precision: str) -> str:
    """What utilisation is also measured against, in words.

    Args:
        name: of the main process's device; None for the CPU.
        flops_per_s: of all devices, NaN where one of them is not known.
    """
    if name is None:
        return "none for a CPU, nor device memory beside that of the process"
    if math.isfinite(flops_per_s):
        tf32 = " in TF32" if precision == "fp32" and rounds_to_tf32() else ""
        return f"{flops_per_s / 1e12:,.0f} TFLOP/s, all devices, dense {precision}{tf32} ({known_as(name)}: {name})"
    return f"unknown: not every device (here: {name}) is in docs/devices.md"
