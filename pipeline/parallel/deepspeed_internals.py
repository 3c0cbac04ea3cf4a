"""Every name of DeepSpeed's that its interface does not promise, in one place.

Read in DeepSpeed 0.19.8 (`READ_IN`): with another version read these again, in `runtime/engine.py`,
`runtime/base_optimizer.py`, `runtime/zero/stage_1_and_2.py`, `runtime/zero/stage3.py`,
`runtime/zero/partitioned_param_coordinator.py`, `utils/tensor_fragment.py` and `accelerator/`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import deepspeed
import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partitioned_param_coordinator, stage3
from torch import Tensor, nn

READ_IN = "0.19.8"

_REDUCTIONS = ("_flush_coalesced_reduction_zero12", "_flush_coalesced_reduction_zero3")
"""The engine's methods that reduce the gradients at the end of `coalesce_grad_reduction`."""


_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
"""Where a module has those that ZeRO 3 works by; PyTorch's names."""


def quieten() -> None:
    """Before the first engine: no warnings, and no compiler."""
    # Its CPU collectives would be compiled at start-up, and a killed build leaves a lock that later runs wait for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)


@contextlib.contextmanager
def in_double_precision() -> Iterator[None]:
    """An engine made inside keeps masters and moments, sums gradients and talks in float64.

    DeepSpeed has settings for half precision and float32 only. Left alone it takes float64 parameters and trains
    something else: their masters are float32, and ZeRO 1 looks for gradients in a float32 buffer that nobody fills, so
    that their norm is 0 and nothing moves. It needs `reduce_scatter` off.
    """
    float64 = torch.float64
    with (
        mock.patch.object(DeepSpeedEngine, "get_data_types", lambda self: (float64, float64)),
        mock.patch.object(DeepSpeedEngine, "communication_data_type", float64),
        mock.patch.object(ZeROOptimizer, "_configure_master_weights", lambda self, **_: float64),
    ):
        yield


@contextlib.contextmanager
def in_mixed_precision() -> Iterator[None]:
    """An engine made inside may train bfloat16 parameters beside float32 ones, in groups of one precision each.

    It is to be made without DeepSpeed's `bf16`, which would make all of them bfloat16: masters, moments, the sum over
    data parallelism and its traffic are then float32, and updated parameters travel as what they are. ZeRO 1 and 2
    need nothing else. ZeRO 3 lays all partitions into one tensor, here into one for each precision. See
    `sum_in_float32` for the gradients.
    """

    def defragment(partitions: list[Tensor]) -> dict[torch.dtype, Tensor]:
        dtypes = dict.fromkeys(partition.dtype for partition in partitions)
        return {dtype: lay_out([x for x in partitions if x.dtype == dtype]) for dtype in dtypes}

    def cut(zero: stage3.DeepSpeedZeroOptimizer_Stage3) -> None:
        taken = dict.fromkeys(zero.lp_param_buffer, 0)
        for group in zero.fp16_groups:
            dtype, size = group[0].ds_tensor.dtype, sum(parameter.partition_numel() for parameter in group)
            zero.fp16_partitioned_groups_flat.append(zero.lp_param_buffer[dtype].narrow(0, taken[dtype], size))
            taken[dtype] += size

    lay_out = stage3.defragment
    with (
        mock.patch.object(stage3, "defragment", defragment),
        mock.patch.object(stage3.DeepSpeedZeroOptimizer_Stage3, "_set_fp16_partitioned_groups_flat", cut),
    ):
        yield


def sum_in_float32(engine: DeepSpeedEngine) -> None:
    """Gradients of bfloat16 parameters are float32 (`pipeline.parallel.accumulators`): DeepSpeed is to make its buffers
    for that, and not by the precision of the first parameter; nor to look for sums in an attribute of its own."""
    zero = engine.optimizer
    zero.dtype = torch.float32
    zero.use_separate_grad_accum = zero.use_grad_accum_attribute = False


@contextlib.contextmanager
def reduced_once(engine: DeepSpeedEngine) -> Iterator[None]:
    """Gradients stay where they are inside, and are averaged over data parallelism at the end.

    An exception leaves without that: DeepSpeed's context reduces whatever passes through it, and would wait, with the
    reason of the failure, for ranks that are somewhere else.
    """
    methods = vars(engine)
    try:
        with engine.coalesce_grad_reduction():
            try:
                yield
            except BaseException:
                methods.update(dict.fromkeys(_REDUCTIONS, lambda optimizer: None))
                raise
    finally:
        for name in _REDUCTIONS:
            methods.pop(name, None)


@contextlib.contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """The parameters of ZeRO 3 are whole inside, and stay so: its hooks, which gather a module's parameters before its
    forward pass and part them behind it, are off. They are all the hooks that the modules have. Collective.

    Without hooks DeepSpeed does not see the passes either, which would be others than it expects.
    """
    hooks = [(part, name, vars(part)[name]) for part in module.modules() for name in _HOOKS]
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        try:
            for part, name, own in hooks:
                vars(part)[name] = type(own)()
            yield
        finally:
            for part, name, own in hooks:
                vars(part)[name] = own


def count_once(parameter: nn.Parameter) -> None:
    """Another pipeline stage holds this parameter too, and counts it in the gradient norm and in a checkpoint."""
    parameter.ds_pipe_replicated = True


def is_counted_elsewhere(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "ds_pipe_replicated", False)


class Partitions:
    """Where a ZeRO optimizer keeps this process's share: flat tensors of many parameters' masters, and gradients.

    Args:
        engine: whose optimizer it is.
        zero_stage: 1, 2 or 3.
        replica_rank: of this process among those that hold the same parameters.
    """

    def __init__(self, engine: DeepSpeedEngine, *, zero_stage: int, replica_rank: int) -> None:
        self.zero, self.zero_stage, self.replica_rank = engine.optimizer, zero_stage, replica_rank

    def flat(self) -> Sequence[nn.Parameter]:
        """The flat masters, which are what the optimizer inside trains. Under ZeRO 1 and 2 one for each of
        `param_groups`."""
        zero = self.zero
        return zero.fp32_partitioned_groups_flat if self.zero_stage == 3 else zero.single_partition_of_fp32_groups

    def locate(self, parameter: nn.Parameter) -> tuple[nn.Parameter, int, int, int]:
        """Flat master, offset in it, first element of the flattened parameter, number of elements (0: none here)."""
        zero = self.zero
        if self.zero_stage == 3:
            group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
            start = self.replica_rank * padded
            return self.flat()[group], offset, start, min(padded, parameter.ds_numel - start)
        mapping = parameter._hp_mapping
        if mapping is None:
            return self.flat()[0], 0, 0, 0
        flat, source = mapping.hp_fragment_address, mapping.lp_fragment_address
        return self.flat()[mapping.param_group_index], flat.start, source.start, flat.numel

    def held(self, parameter: nn.Parameter) -> Tensor:
        """What this process holds of a parameter itself: all of it, or (ZeRO 3) its own part, padded."""
        return (parameter.ds_tensor if self.zero_stage == 3 else parameter).detach()

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """A parameter's shape; ZeRO 3 leaves only a remnant in the parameter itself."""
        return tuple(parameter.ds_shape if self.zero_stage == 3 else parameter.shape)

    def count(self, parameter: nn.Parameter) -> int:
        """A parameter's elements."""
        return parameter.ds_numel if self.zero_stage == 3 else parameter.numel()

    def copy_masters(self, parameters: Sequence[nn.Parameter]) -> None:
        """Copy the masters into the trained `parameters`."""
        if self.zero_stage < 3:
            self.zero.update_lp_params()
            return
        for parameter in parameters:
            flat, offset, _, count = self.locate(parameter)
            part = parameter.ds_tensor.data[: max(count, 0)]
            part.copy_(flat.detach().narrow(0, offset, max(count, 0)))

    def gradients(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        """The averaged gradients that this process owns (of a parameter, or of a part of it), before clipping."""
        groups = self.zero.fp16_groups if self.zero_stage == 3 else self.zero.params_in_partition
        for i, parameters in enumerate(groups):
            averaged = self.zero.averaged_gradients[i]
            own = (gradient for gradient in averaged if not getattr(gradient, "_zero_padding", False))
            yield from zip(own, parameters, strict=False)

    def replace_norm(self, measure: Callable[[], Tensor]) -> None:
        """Have `measure` give the norm of all gradients in the step."""
        if self.zero_stage == 3:
            self.zero._get_norm_groups = lambda: [measure()]
        else:
            self.zero.scaled_global_norm = measure


class _PretendedAccelerator(CPU_Accelerator):
    """DeepSpeed's view of a device that PyTorch does not name."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._name, self._communication_backend_name = device.type, "fake"

    def device_name(self, device_index: int | None = None) -> str:
        return self._name if device_index is None else f"{self._name}:{device_index}"

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return self.device_name(0)

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._name


@contextlib.contextmanager
def pretending(device: torch.device) -> Iterator[None]:
    """Engines inside are on `device`, whatever the machine has, and nobody compares what the processes do: there is
    one."""
    with (
        mock.patch.object(real_accelerator, "ds_accelerator", _PretendedAccelerator(device)),
        mock.patch.object(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", lambda ints: None),
        mock.patch.dict(os.environ, {"LOCAL_RANK": "0"}),
    ):
        yield
