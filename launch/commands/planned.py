"""What a plan is made for and rests on: its configuration and processes, a device's data sheet, and what is assumed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from data.files import place
from pipeline.accounting.devices import ACCELERATORS

if TYPE_CHECKING:
    from pipeline.accounting.planner import Rates
    from pipeline.config.schema import Config

ASSUMED_VOCAB = 32768
"""Tokens of a tokenizer that is not there yet; the plan says so when it assumes it."""
ASSUMED_SHARE = 0.4
"""Of a device's peak that it reaches while it computes. Nothing has been measured on a GPU with this code; torchtitan
reports 33 to 39 % for Llama 3.1 8B on H100s in bf16, communication included."""
BETWEEN_NODES_GB = 50.0
"""400 Gbit/s for each device."""
LAUNCH_US = 5.0
"""Of PyTorch without CUDA graphs, about."""
DISK_GB = 2.0
"""Of a node, into a parallel file system."""


def planned_world_size(args: argparse.Namespace) -> int:
    """Processes of the run, by --world-size or --nodes.

    Raises:
        ValueError: neither is given, both are, or an option has no meaning without --search.
    """
    if (args.world_size is None) == (args.nodes is None):
        given = "exclude each other" if args.nodes else "are missing"
        raise ValueError(f"--world-size and --nodes {given}: give the processes of the run, or its nodes")
    for name in ("tokens", "json"):
        if getattr(args, name) is not None and not args.search:
            raise ValueError(f"--{name} needs --search")
    for name in ("schedule", "trace", "png"):
        if getattr(args, name) and args.search:
            raise ValueError(f"--{name} is of one layout: plan without --search, with the settings that it has found")
    return args.world_size or args.nodes * args.gpus_per_node


def planned_config(args: argparse.Namespace) -> Config:
    """The configuration of a command line, valid for so many processes.

    Raises:
        ConfigError: it is not.
    """
    from pipeline.config.load import load_config
    from pipeline.config.validate import validate

    config = load_config(args.config, args.overrides)
    validate(config, args.world_size, data_exists=False, file=args.config, overrides=args.overrides)
    return config


def planned_rates(config: Config, args: argparse.Namespace) -> Rates:
    """What the options and the device's data sheet say."""
    from pipeline.accounting.planner import Rates

    device = ACCELERATORS[args.gpu]
    tflops = args.tflops or ASSUMED_SHARE * device.tflops[config.train.precision]
    one_node = args.world_size <= args.gpus_per_node
    link = args.link or (device.node_link_gb_per_s if one_node else BETWEEN_NODES_GB)

    return Rates(
        flops_per_s=tflops * 1e12,
        link_bytes_per_s=link * 1e9,
        node_bytes_per_s=device.node_link_gb_per_s * 1e9,
        start_s=args.launch_us * 1e-6,
        gpus_per_node=args.gpus_per_node,
    )


def planned_vocabulary(config: Config) -> tuple[int, str]:
    """The size of the vocabulary, and where it is known from."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size, "model.vocab_size"
    found = [entry.path for entry in config.data.sets if (place(entry.path) / "manifest.json").is_file()]
    if found:
        from data.prepared.shards import PreparedSet

        sizes = {path: PreparedSet(path).vocab_size for path in found}
        path = max(sizes, key=sizes.get)
        return sizes[path], path
    return ASSUMED_VOCAB, "ASSUMED: model.vocab_size is null and no prepared set is there"


def told_rates(args: argparse.Namespace, rates: Rates) -> str:
    """What a prediction rests on, and where each number is from."""
    source = "--tflops" if args.tflops else f"ASSUMED, {100 * ASSUMED_SHARE:g} % of the peak"
    link = "--link" if args.link else "ASSUMED"
    return (
        f"{rates.flops_per_s / 1e12:,.4g} TFLOP/s while computing ({source}); "
        f"{rates.link_bytes_per_s / 1e9:g} GB/s between stages, replicas and nodes ({link}), "
        f"{rates.node_bytes_per_s / 1e9:g} GB/s inside a node; {1e6 * rates.start_s:g} us to start a "
        "kernel (--launch-us); only transfers between stages hide behind computation; the optimizer's own work, "
        "reading data and saving take no time"
    )
