"""AdamW behind DeepSpeed's ZeRO, fed by our own schedule.

The schedule calls `torch.autograd.backward` many times per step. Inside `accumulate()` DeepSpeed leaves the gradients
where they are; at its end they are averaged over data x context once. ZeRO 2 therefore saves no gradient memory over
ZeRO 1 during the backward passes.

Masters and moments are float32, shared out over data x context. Under `train.precision=bf16` the matrices that the
model computes with are bfloat16 copies of them, rounded once per step, when the masters have moved; their gradients are
summed in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.decoder import DecoderStage
from model.huggingface.weights import backbone_names
from model.megatron import parallel_state
from pipeline.config.derived import REDUCTION_BUCKET
from pipeline.config.schema import Config
from pipeline.parallel.accumulators import accumulate_in_float32
from pipeline.parallel.deepspeed_internals import (
    Partitions,
    count_once,
    in_double_precision,
    in_mixed_precision,
    is_counted_elsewhere,
    quieten,
    reduced_once,
    sum_in_float32,
    unsharded,
)
from pipeline.parallel.gradient_norm import GradientNorm
from pipeline.parallel.parameter_groups import Kind, all_kinds, choose_trainable, parameter_groups
from pipeline.parallel.topology import Topology
from pipeline.parallel.untrained import UntrainedMasters

MOMENTS = ("exp_avg", "exp_avg_sq")


class StepOutcome(NamedTuple):
    applied: bool
    """False when DeepSpeed discarded the step because the gradient norm was not finite, or it was not accepted."""
    gradient_norm: float
    """Global norm before clipping; infinite or NaN when the step was discarded."""
    norms: dict[str, float]
    """The same of the parameters of every kind, by its name."""


class Fragment(NamedTuple):
    """The part of one parameter's state that this process owns: a range of the flattened tensor-parallel part."""

    name: str
    """Name in the whole model."""
    parameter: nn.Parameter
    start: int
    """First element of the range."""
    tensors: dict[str, Tensor]
    """`master`, `exp_avg` and `exp_avg_sq`, one-dimensional views; a parameter that is not trained has no moments."""
    shared: bool = False
    """All replicas hold the same range."""

    @property
    def is_second_copy(self) -> bool:
        """Of a tied embedding: the first stage has the other one."""
        return is_counted_elsewhere(self.parameter)


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
    # What DeepSpeed calls data parallelism is who holds the same parameters.
    get_data_parallel_group = staticmethod(lambda: parallel_state.get_data_parallel_group(with_context_parallel=True))
    get_data_parallel_rank = staticmethod(lambda: parallel_state.get_data_parallel_rank(with_context_parallel=True))
    get_data_parallel_world_size = staticmethod(
        lambda: parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    )


class ZeroOptimizer:
    """One stage's optimizer: gradient synchronisation, the step, and access to the sharded state."""

    def __init__(self, stage: DecoderStage, topology: Topology, config: Config) -> None:
        self.stage = stage
        self.topology = topology
        self.zero_stage = config.parallel.zero_stage
        for name, parameter in stage.named_parameters():
            if stage.holds_embedding_copy and name == "output.weight":
                count_once(parameter)  # on the first stage
        choose_trainable(stage, config.train.trainable, topology)
        settings = config.optimizer
        groups = parameter_groups(stage, config)
        self.kinds = all_kinds(groups, topology)
        kind_of = {id(parameter): group["kind"] for group in groups for parameter in group["params"]}
        adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps)
        quieten()
        # Names are kept from before ZeRO 3 takes the parameters apart.
        self.named = list(stage.named_parameters())
        self.global_names = {id(parameter): name for name, parameter in stage.global_parameters()}
        names = backbone_names(config.model)
        self.backbone = [p for name, p in stage.global_parameters() if name in names and p.requires_grad]
        self.backbone_frozen = False
        """Set before a step: the plain model's parameters do not move in it, and their moments stay zero."""
        precision = config.train.precision
        double = precision == "fp64"
        special = {"fp64": in_double_precision, "bf16": in_mixed_precision}.get(precision, contextlib.nullcontext)
        accumulate_in_float32(stage.parameters())
        with special():
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
                        "reduce_scatter": not double,  # DeepSpeed's knows no float64
                        "reduce_bucket_size": REDUCTION_BUCKET,
                        "stage3_param_persistence_threshold": 0,
                    },
                    "steps_per_print": 10**9,
                },
            )
        if precision == "bf16":
            sum_in_float32(self.engine)
        self.partitions = Partitions(self.engine, zero_stage=self.zero_stage, replica_rank=topology.replica_rank)
        self.norm = GradientNorm(self.partitions, self.kinds, kind_of, topology)
        self.untrained = UntrainedMasters(self.partitions, topology, stage.parameters())
        self.adamw = adamw

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Run all forward and backward passes of a step inside; at the end the gradients are synchronised.

        An exception leaves without that.
        """
        with reduced_once(self.engine):
            yield
            self._synchronise_replicas()

    def _synchronise_replicas(self) -> None:
        """Sum the gradients of parameters that exist more than once inside one model copy."""
        if self.backbone_frozen:
            for parameter in self.backbone:
                parameter.grad.zero_()
        for name, parameter in self.named:
            if not parameter.requires_grad:
                continue
            if getattr(parameter, "partial_gradient", False):
                dist.all_reduce(parameter.grad, group=self.topology.tensor_group)
            tied_over_stages = self.stage.config.tie_embeddings and self.topology.pipeline_size > 1
            if tied_over_stages and name in ("embedding.weight", "output.weight"):
                dist.all_reduce(parameter.grad, group=self.topology.embedding_group)

    def step(
        self,
        learning_rate: float,
        sums: Tensor | None = None,
        accept: Callable[[list[float]], bool] = lambda sums: True,
    ) -> StepOutcome:
        """Clip, update and gather the parameters; gradients are cleared either way.

        Args:
            sums: float64, numbers of this process that travel with the norms and are summed over all processes.
            accept: gets these sums, the same on all processes, before anything moves; False discards the step, by
                DeepSpeed's own path for gradients that are not finite.
        """
        self.norm.alongside = torch.zeros(0) if sums is None else sums
        self.norm.accept = accept
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate * self.lr_scale(group["kind"])
        self.engine.step()
        if self.backbone_frozen:
            self._set_steps(self._backbone_partitions(), 0)  # Adam begins when they begin to move
        return StepOutcome(
            self.engine.was_step_applied(), float(self.engine.get_global_grad_norm()), dict(self.norm.by_kind)
        )

    def lr_scale(self, kind: Kind) -> float:
        """Learning rate of a kind of parameters in the step to come, relative to `optimizer.lr`."""
        return 0.0 if self.backbone_frozen and kind.backbone else kind.lr_scale

    def trained_names(self) -> dict[str, Kind]:
        """Names of the parameters that any stage trains, in order, and their kinds; collective."""
        own = {self.global_names[id(p)]: self.norm.kind_of[id(p)] for _, p in self.named if p.requires_grad}
        return dict(sorted(item for kinds in self.topology.over_stages(own) for item in kinds.items()))

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What this process holds of the masters of trained parameters, by their names in the whole model. A bfloat16
        copy stays where it is while its master moves by less than 1/256."""
        for _, parameter in self.named:
            if parameter.requires_grad:
                yield self.global_names[id(parameter)], self._own_master(parameter)

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Inside, every process has its part of the model as ZeRO 1 leaves it, without the traffic of ZeRO 3 in every
        pass: data-parallel ranks may run different numbers of forward passes. Nothing may change; collective.

        It takes the bytes of the parameters, and no more than a step has: all gradients of a rank are there then.
        """
        return unsharded(self.stage) if self.zero_stage == 3 else contextlib.nullcontext()

    # Sharded state, for checkpoints.

    def _backbone_partitions(self) -> list[nn.Parameter]:
        if self.zero_stage == 3:
            return list({id(flat): flat for flat in (self.partitions.locate(p)[0] for p in self.backbone)}.values())
        flats = zip(self.partitions.flat(), self.engine.optimizer.param_groups, strict=True)
        return [flat for flat, group in flats if group["kind"].backbone]

    def _own_master(self, parameter: nn.Parameter) -> Tensor:
        flat, offset, _, count = self.partitions.locate(parameter)
        return flat.detach().narrow(0, offset, max(count, 0))

    def initialize(self, seed: int) -> None:
        """Give parameters and masters the model's initial values; collective. Each is drawn once, and a bfloat16
        parameter is rounded from its master: runs of all precisions begin with the same weights."""
        for _, parameter in self.named:
            name, shape = self.global_names[id(parameter)], self.local_shape(parameter)
            value = self.stage.initial_value(name, parameter, shape, seed)
            if value is None:
                continue
            if parameter.requires_grad:
                master, start = self._own_master(parameter), self.partitions.locate(parameter)[2]
            else:
                untrained = self._untrained(name, parameter)
                master, start = untrained.tensors["master"], untrained.start
            master.copy_(value.flatten()[start : start + master.numel()])
        self.refresh_parameters()

    def steps_taken(self) -> tuple[int, int]:
        """Optimizer steps so far (skipped ones do not count), of all parameters and of the plain model's, which may
        have been frozen at first: Adam's bias correction depends on it. The same on all processes, for one stage may
        train nothing of the plain model; collective."""

        def most(flats: list[nn.Parameter]) -> float:
            return max((float(self.adamw.state.get(flat, {}).get("step", 0)) for flat in flats), default=0.0)

        own = [most(self.partitions.flat()), most(self._backbone_partitions())]
        steps, backbone_steps = self.topology.all_reduce(own, op=dist.ReduceOp.MAX)
        return int(steps), int(backbone_steps)

    def set_steps_taken(self, steps: int, backbone_steps: int) -> None:
        """Set Adam's step counts, creating its state where it does not exist yet (AdamW makes it in its first step)."""
        self._set_steps(self.partitions.flat(), steps)
        self._set_steps(self._backbone_partitions(), backbone_steps)

    def _set_steps(self, flats: list[nn.Parameter], steps: int) -> None:
        for flat in flats:
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
            name = self.global_names[id(parameter)]
            if not parameter.requires_grad:
                fragment = self._untrained(name, parameter)
                if fragment.tensors["master"].numel():
                    yield fragment
                continue
            flat, offset, start, count = self.partitions.locate(parameter)
            if count <= 0:
                continue
            state = self.adamw.state[flat]
            yield Fragment(
                name=name,
                parameter=parameter,
                start=start,
                tensors={
                    kind: tensor.detach().narrow(0, offset, count)
                    for kind, tensor in (("master", flat), *((moment, state[moment]) for moment in MOMENTS))
                },
            )

    def _untrained(self, name: str, parameter: nn.Parameter) -> Fragment:
        if parameter in self.untrained.parts:
            return Fragment(
                name, parameter, self.untrained.start(parameter), {"master": self.untrained.parts[parameter]}
            )
        part = self.partitions.held(parameter).view(-1)
        if self.zero_stage < 3:
            return Fragment(name, parameter, 0, {"master": part}, shared=True)
        start = self.topology.replica_rank * part.numel()  # ZeRO 3 shares out what is not trained too
        count = max(0, min(part.numel(), self.partitions.count(parameter) - start))
        return Fragment(name, parameter, start, {"master": part[:count]})

    def local_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape of this tensor-parallel rank's part."""
        return self.partitions.shape(parameter)

    def refresh_parameters(self) -> None:
        """Copy the masters into the model's own parameters, on all processes, after the masters were written."""
        self.partitions.copy_masters([p for _, p in self.named if p.requires_grad])
        self.untrained.refresh_parameters()
