"""Which parameters train, and in which of AdamW's groups."""

from __future__ import annotations

import fnmatch
from typing import NamedTuple

import torch
from torch import nn

from model.decoder import DecoderStage
from model.huggingface.weights import backbone_names
from pipeline.config.schema import Config, OptimizerConfig
from pipeline.parallel.topology import Topology


class Kind(NamedTuple):
    """What the parameters of a group have in common."""

    name: str
    lr_scale: float
    """Learning rate relative to `optimizer.lr`."""
    weight_decay: float
    backbone: bool
    """The plain model's parameters, not the memory's."""


def choose_trainable(stage: DecoderStage, patterns: list[str], topology: Topology) -> None:
    """Leave only parameters to train whose global name fits one of the patterns (all without patterns); collective.

    Raises:
        ValueError: a pattern fits nothing, or a pipeline stage has nothing to train.
    """
    if not patterns:
        return
    own = dict(stage.global_parameters())
    everyone = topology.over_stages(set(own))
    for pattern in patterns:
        if not any(fnmatch.filter(names, pattern) for names in everyone):
            raise ValueError(
                f"train.trainable: {pattern!r} fits no parameter; they are called like "
                f"{', '.join(sorted(name for name in set().union(*everyone) if name.startswith('layers.0.')))}"
            )
    for names in everyone:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns):
            layers = sorted({int(name.split(".")[1]) for name in names if name.startswith("layers.")})
            raise ValueError(
                f"train.trainable = {patterns}: leaves the pipeline stage of layers {layers[0]} to {layers[-1]} "
                "without anything to train; every stage needs something"
            )
    for name, parameter in own.items():
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def kind_of(name: str, parameter: nn.Parameter, optimizer: OptimizerConfig, *, backbone: bool) -> Kind:
    """The kind of a parameter of this global name.

    Matrices have weight decay, vectors none; the mix gate (beta) and the write gate have rates of their own. What a
    memory rule calls a gate (a decay) learns like the write gate.
    """
    if name.endswith(".beta") or ".mix_gate." in name:
        return Kind("mix_gate", optimizer.beta_lr_scale, 0.0, backbone)
    if ".write_gate." in name or getattr(parameter, "is_gate", False):
        return Kind("write_gate", optimizer.write_gate_lr_scale, 0.0, backbone)
    owner = "model" if backbone else "memory"
    if parameter.dim() >= 2:
        return Kind(f"{owner}_matrices", 1.0, optimizer.weight_decay, backbone)
    return Kind(f"{owner}_vectors", 1.0, 0.0, backbone)


def parameter_groups(stage: DecoderStage, config: Config) -> list[dict]:
    """This stage's AdamW groups, one per kind and precision that it trains any of; `kind` says which.

    ZeRO lays a group's parameters into one tensor, so that a group has one precision: under bfloat16 the biases of a
    projection are apart from the norms.
    """
    backbone = backbone_names(config.model)
    groups: dict[tuple[Kind, torch.dtype], list[nn.Parameter]] = {}
    for name, parameter in stage.global_parameters():
        if parameter.requires_grad:
            kind = kind_of(name, parameter, config.optimizer, backbone=name in backbone)
            groups.setdefault((kind, parameter.dtype), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": kind.weight_decay, "kind": kind}
        for (kind, _), parameters in groups.items()
    ]


def all_kinds(groups: list[dict], topology: Topology) -> list[Kind]:
    """The kinds that any stage trains, in one order on all processes; collective."""
    return sorted(set().union(*topology.over_stages({group["kind"] for group in groups})))
