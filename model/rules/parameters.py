"""The parameters that a memory rule adds to a layer, on Megatron-core's tensor-parallel layers.

They belong to the attention module itself, under names that begin with `memory_`: ZeRO 3 gathers a module's parameters
around its forward, so a module of their own would have them for as long as it computes and no longer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.backend import local_linears
from model.config import LayerShape
from model.megatron import TransformerConfig
from model.rules import MemoryRule

PREFIX = "memory_"


def add_rule_parameters(
    module: nn.Module, rule: MemoryRule, layer: LayerShape, megatron: TransformerConfig, *, tensor_size: int
) -> None:
    """Give `module` one rank's part of what `rule` asks for in the whole `layer`: nothing for most rules."""
    parameters, inputs = rule.parameters(layer), rule.token_inputs(layer)
    for name, numbers in inputs.items():
        linear = local_linears().column_parallel_linear()(
            layer.hidden,
            layer.groups * numbers,
            bias=f"{name}.bias" in parameters,
            gather_output=False,
            config=megatron,
            init_method=None,
        )
        module.add_module(PREFIX + name, linear)
    for name, parameter in parameters.items():
        if name.partition(".")[0] not in inputs:
            rows, *rest = parameter.shape
            values = torch.empty(rows // tensor_size, *rest, dtype=megatron.params_dtype)
            module.register_parameter(PREFIX + name, nn.Parameter(values))
        # Read by the optimizer's groups.
        module.get_parameter(PREFIX + name).is_gate = parameter.is_gate


def rule_inputs(
    rule: MemoryRule, layer: LayerShape, numbers: Mapping[str, Tensor], b: int, t: int
) -> dict[str, Tensor]:
    """The rule's `token_inputs`, each `[b, t, n, s, w]`, from what their layers give: `[s, b*t, n*w]`, by name.

    Args:
        layer: the rank's part of it.
    """
    found = {}
    for name, width in rule.token_inputs(layer).items():
        by_head = numbers[PREFIX + name].unflatten(-1, (layer.groups, width))
        found[name] = by_head.permute(1, 2, 0, 3).unflatten(0, (b, t))
    return found


def rule_weights(module: nn.Module) -> dict[str, Tensor]:
    """The rule's other parameters, by the rule's names for them."""
    own = module.named_parameters(recurse=False)
    return {name.removeprefix(PREFIX): parameter for name, parameter in own if name.startswith(PREFIX)}
