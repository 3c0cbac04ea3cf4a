"""AdamW behind DeepSpeed's ZeRO, fed by our own schedule.

The schedule calls `torch.autograd.backward` many times per step. Inside `accumulate()` DeepSpeed leaves the gradients
where they are (`coalesce_grad_reduction`); at its end they are averaged over data parallelism once. ZeRO 2 therefore
saves no gradient memory over ZeRO 1 during the backward passes.

Parameters are float32 and are the masters themselves; bfloat16 exists in the matrix products only (autocast).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from model.decoder import DecoderStage
from pipeline.config import Config
from pipeline.topology import Topology

MOMENTS = ("exp_avg", "exp_avg_sq")


class StepOutcome(NamedTuple):
    applied: bool
    """False when DeepSpeed discarded the step because the gradient norm was not finite."""
    gradient_norm: float
    """Global norm before clipping; infinite or NaN when the step was discarded."""


class Fragment(NamedTuple):
    """The part of one parameter's state that this process owns: a range of the flattened tensor-parallel part."""

    name: str
    """Name in the whole model."""
    parameter: nn.Parameter
    start: int
    """First element of the range."""
    tensors: dict[str, Tensor]
    """`master`, `exp_avg` and `exp_avg_sq`, one-dimensional views."""


class _ModelParallelUnit:
    """Megatron's groups under the names that DeepSpeed asks for."""

    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_model_parallel_world_size = staticmethod(lambda: dist.get_world_size(parallel_state.get_model_parallel_group()))
    get_model_parallel_rank = staticmethod(lambda: dist.get_rank(parallel_state.get_model_parallel_group()))
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)


def parameter_groups(stage: DecoderStage, config: Config) -> list[dict]:
    """AdamW groups: matrices with weight decay, vectors without, beta and the write gate with rates of their own.

    What a memory rule calls a gate (a decay) learns like the write gate. Every group carries `lr_scale`, its learning
    rate relative to `optimizer.lr`.
    """
    decayed, plain, beta, gate = [], [], [], []
    for name, parameter in stage.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(".beta"):
            beta.append(parameter)
        elif ".write_gate." in name or getattr(parameter, "is_gate", False):
            gate.append(parameter)
        else:
            (decayed if parameter.dim() >= 2 else plain).append(parameter)
    optimizer = config.optimizer
    groups = [
        {"params": decayed, "weight_decay": optimizer.weight_decay, "lr_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": beta, "weight_decay": 0.0, "lr_scale": optimizer.beta_lr_scale},
        {"params": gate, "weight_decay": 0.0, "lr_scale": optimizer.write_gate_lr_scale},
    ]
    return [group for group in groups if group["params"]]


class ZeroOptimizer:
    """One stage's optimizer: gradient synchronisation, the step, and access to the sharded state."""

    def __init__(self, stage: DecoderStage, topology: Topology, config: Config) -> None:
        self.stage = stage
        self.topology = topology
        self.zero_stage = config.parallel.zero_stage
        for name, parameter in stage.named_parameters():
            if stage.holds_embedding_copy and name == "output.weight":
                parameter.ds_pipe_replicated = True  # counted once in the gradient norm, on the first stage
        settings = config.optimizer
        adamw = torch.optim.AdamW(
            parameter_groups(stage, config), lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps
        )
        # Its CPU collectives would be compiled at start-up, and a killed build leaves a lock that later runs wait for.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.utils.logger.setLevel(logging.ERROR)
        # Names are kept from before ZeRO 3 takes the parameters apart.
        self.named = list(stage.named_parameters())
        self.global_names = {id(parameter): name for name, parameter in stage.global_parameters()}
        self.engine, *_ = deepspeed.initialize(
            model=stage,
            optimizer=adamw,
            mpu=_ModelParallelUnit,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": settings.clip,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {
                    "stage": self.zero_stage,
                    "overlap_comm": False,
                    "reduce_bucket_size": 50_000_000,
                    "stage3_param_persistence_threshold": 0,
                },
                "steps_per_print": 10**9,
            },
        )
        self.adamw = adamw

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Run all forward and backward passes of a step inside; at the end the gradients are synchronised."""
        with self.engine.coalesce_grad_reduction():
            yield
            self._synchronise_replicas()

    def _synchronise_replicas(self) -> None:
        """Sum the gradients of parameters that exist more than once inside one model copy."""
        for name, parameter in self.named:
            if getattr(parameter, "partial_gradient", False):
                dist.all_reduce(parameter.grad, group=self.topology.tensor_group)
            tied_over_stages = self.stage.config.tie_embeddings and self.topology.pipeline_size > 1
            if tied_over_stages and name in ("embedding.weight", "output.weight"):
                dist.all_reduce(parameter.grad, group=self.topology.embedding_group)

    def poison(self) -> None:
        """Make DeepSpeed discard this step on all processes: its own path for gradients that are not finite."""
        for _, parameter in self.named:
            if parameter.grad is not None:
                parameter.grad.fill_(math.nan)
                return

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip, update and gather the parameters; gradients are cleared either way."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        self.engine.step()
        return StepOutcome(self.engine.was_step_applied(), float(self.engine.get_global_grad_norm()))

    def learning_rates(self) -> dict[str, float]:
        """Current learning rate of each kind of group."""
        rates = {}
        for group in self.engine.optimizer.param_groups:
            kind = {1.0: "lr"}.get(group["lr_scale"], f"lr x {group['lr_scale']:g}")
            rates[kind] = group["lr"]
        return rates

    # Sharded state, for checkpoints.

    def _flat_partitions(self) -> list[nn.Parameter]:
        zero = self.engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.zero_stage == 3 else zero.single_partition_of_fp32_groups

    def steps_taken(self) -> int:
        """Optimizer steps so far (skipped ones do not count): Adam's bias correction depends on it."""
        state = self.adamw.state.get(self._flat_partitions()[0], {})
        return int(state["step"]) if "step" in state else 0

    def set_steps_taken(self, steps: int) -> None:
        """Set Adam's step count, creating its state where it does not exist yet (AdamW makes it in its first step)."""
        for flat in self._flat_partitions():
            state = self.adamw.state[flat]
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(flat)
            state["step"] = torch.tensor(float(steps))

    def fragments(self) -> Iterator[Fragment]:
        """The optimizer state that this process owns, as views: writing to them changes the state.

        Adam's state must exist: after a step, or `set_steps_taken`.
        """
        for _, parameter in self.named:
            flat, offset, start, count = self._locate(parameter)
            if count <= 0:
                continue
            state = self.adamw.state[flat]
            yield Fragment(
                name=self.global_names[id(parameter)],
                parameter=parameter,
                start=start,
                tensors={
                    kind: tensor.detach().narrow(0, offset, count)
                    for kind, tensor in (("master", flat), *((moment, state[moment]) for moment in MOMENTS))
                },
            )

    def local_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape of this tensor-parallel rank's part (ZeRO 3 leaves only a remnant in the parameter itself)."""
        return tuple(parameter.ds_shape if self.zero_stage == 3 else parameter.shape)

    def refresh_parameters(self) -> None:
        """Copy the masters into the model's own parameters, on all processes, after the masters were written."""
        if self.zero_stage < 3:
            self.engine.optimizer.update_lp_params()
            return
        for _, parameter in self.named:
            flat, offset, _, count = self._locate(parameter)
            parameter.ds_tensor.data[: max(count, 0)].copy_(flat.detach().narrow(0, offset, max(count, 0)))

    def _locate(self, parameter: nn.Parameter) -> tuple[nn.Parameter, int, int, int]:
        """Flat partition, offset in it, first element of the flattened parameter, number of elements (0: none here)."""
        zero = self.engine.optimizer
        if self.zero_stage == 3:
            group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
            start = self.topology.data_rank * padded
            return zero.fp32_partitioned_groups_flat[group], offset, start, min(padded, parameter.ds_numel - start)
        mapping = parameter._hp_mapping
        if mapping is None:
            return zero.single_partition_of_fp32_groups[0], 0, 0, 0
        flat, source = mapping.hp_fragment_address, mapping.lp_fragment_address
        return zero.single_partition_of_fp32_groups[mapping.param_group_index], flat.start, source.start, flat.numel
