"""Options that several benchmarks share: the sizes of a model, and where it runs."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from launch.arguments import positive_int

if TYPE_CHECKING:
    import torch

    from pipeline.benchmarks.contestants import Sizes

RULES = ("linear", "delta", "deltanet", "gated_deltanet", "delta_product", "kda", "gdn2")
"""Memory rules that can be asked for."""
SIZES = {
    "hidden": "hidden size",
    "layers": "layers",
    "heads": "heads",
    "ffn": "width of the MLP",
    "vocab": "tokens of the vocabulary",
}


def add_sizes(parser: argparse.ArgumentParser, **defaults: int) -> argparse._ArgumentGroup:
    """Those sizes of every model of a benchmark that have a default; returns their group, for more."""
    group = parser.add_argument_group("sizes, of every model (--quick has its own)")
    for name, what in SIZES.items():
        if name not in defaults:
            continue
        group.add_argument(
            f"--{name}", type=positive_int, default=defaults[name], metavar="N", help=f"{what} (%(default)s)"
        )
    return group


def add_segment_length(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--segment-length", type=positive_int, default=256, metavar="S", help="tokens of a segment (%(default)s)"
    )


def check_sizes(args: argparse.Namespace) -> None:
    """Raises: ValueError: heads that do not divide the hidden size."""
    check_multiple(args, "hidden", "heads")


def check_multiple(args: argparse.Namespace, whole: str, part: str) -> None:
    """Raises: ValueError: the option `whole` is no multiple of the option `part`."""
    (option, number), (unit_option, unit) = (
        (f"--{name.replace('_', '-')}", getattr(args, name)) for name in (whole, part)
    )
    if number % unit:
        raise ValueError(f"{option} {number} must be a multiple of {unit_option} {unit}")


def model_sizes(args: argparse.Namespace, **others: int) -> Sizes:
    """The sizes that the options of `add_sizes` give, and those that have other names or no option."""
    from pipeline.benchmarks.contestants import Sizes

    own = {name: getattr(args, name) for name in Sizes._fields if name not in others}
    return Sizes(**own, **others)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Where the models run."""
    parser.add_argument("--threads", type=positive_int, default=1, metavar="N", help="of the processor (%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")


def choose_device(args: argparse.Namespace) -> torch.device:
    """The device that every model will run on, for this process and those it starts; before anything asks for CUDA.

    A process that has asked cannot be forked: a benchmark that measures in processes of its own has one of them ask.

    Raises:
        ValueError: it is not there.
    """
    hide_devices(args)
    import torch

    from model.device import default_device

    device = default_device()
    if args.device == "cuda" and device.type != "cuda":
        raise ValueError("--device cuda: torch sees no CUDA device here")
    torch.set_num_threads(args.threads)
    return device


def hide_devices(args: argparse.Namespace) -> None:
    """With `--device cpu` nothing here, nor in processes that this one starts, sees another device."""
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def machine_in_words(device: torch.device, threads: int) -> str:
    if device.type != "cpu":
        return device.type
    return f"processor, {threads} thread{'s' if threads > 1 else ''}"
