"""What an accelerator is asked to do: kernel launches, collectives, and values that the host waits for."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.tracing.host_reads import Place, calling_place

aten = torch.ops.aten

LAUNCH_NOTHING = {
    torch.ops.prim.device.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.lift_fresh.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._local_scalar_dense.default,
}
"""Operations that start no kernel, beside views."""

DTYPE_COPY = aten._to_copy.default

SHAPE_OF_VALUES = (
    "the shape of what {operation} gives depends on values, so the host would have to wait for the device here: {place}"
)


class MixedDevicesError(ValueError):
    """An operation got tensors of two devices."""


class HostReadError(ValueError):
    """A read that the trace cannot go on after: what follows would have a shape that only the values know."""


class Launch(NamedTuple):
    """One kind of launch."""

    phase: str
    """forward, recomputation, backward, or what the caller has set."""
    in_layers: bool
    """Of a decoder layer; else of the embedding, the output, the loss, or what is between the chunks."""
    operation: str


class Collective(NamedTuple):
    group: str
    kind: str


class Traffic(NamedTuple):
    calls: int
    bytes: int
    """Of the tensors as the operation's caller sees them whole: what a gather gives, what a scatter or a sum takes."""


class HostRead(NamedTuple):
    operation: str
    place: Place


class Ledger(TorchDispatchMode):
    """Writes down what runs on a device of `device_type`, inside `with`.

    Args:
        device_type: of the device that counts.
        groups: labels of process groups by their name.
    """

    def __init__(self, device_type: str, groups: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.device_type, self.groups = device_type, dict(groups or {})
        self.phase = "forward"
        self.launches: Counter[Launch] = Counter()
        self.dtype_copies: Counter[tuple[str, str]] = Counter()
        """By the two dtypes; those in layers."""
        self.collectives: dict[Collective, Traffic] = {}
        self.reads: Counter[HostRead] = Counter()
        self.unread_copies: Counter[HostRead] = Counter()
        """Copies to host memory that nobody waits for."""
        self._last_read: tuple | None = None
        self._depth = self._recomputing = 0
        self._spans: list[tuple[int, int]] = []
        """Of the autograd nodes that layers have made, by their sequence numbers."""
        self._layer_parameters: set[int] = set()

    @contextmanager
    def watching(self, layers: nn.ModuleDict):
        """Tell what `layers` do from the rest."""
        self._layer_parameters = {id(p) for p in layers.parameters()}
        ledger = self

        class Recomputation(torch.utils.checkpoint._recomputation_hook):
            """What PyTorch enters while a checkpointed part runs again."""

            def __enter__(self) -> None:
                ledger._recomputing += 1
                super().__enter__()

            def __exit__(self, *exception: Any) -> None:
                ledger._recomputing -= 1
                super().__exit__(*exception)

        started: list[int] = []

        def enter(*_: Any) -> None:
            if torch._C._current_autograd_node() is not None:
                return  # a recomputation, in a thread that counts for itself
            self._depth += 1
            started.append(torch.autograd._get_sequence_nr())

        def leave(*_: Any) -> None:
            if torch._C._current_autograd_node() is not None:
                return
            self._depth -= 1
            self._spans.append((started.pop(), torch.autograd._get_sequence_nr()))

        handles = []
        for layer in layers.values():
            handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave, always_call=True)]
        try:
            with mock.patch.object(torch.utils.checkpoint, "_recomputation_hook", Recomputation):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        try:
            result = function(*args, **kwargs)
        except DataDependentOutputException:
            return self._read(function, args)
        except DynamicOutputShapeException as error:
            raise HostReadError(SHAPE_OF_VALUES.format(operation=function, place=calling_place())) from error
        except FakeTensorDeviceMismatchError as error:
            devices = sorted({str(x.device) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)})
            raise MixedDevicesError(
                f"{function} gets tensors of {' and '.join(devices)}, which an accelerator cannot do: {calling_place()}"
            ) from error
        if function.namespace == "c10d":
            self._communicate(function, args)
        elif not function.is_view and function not in LAUNCH_NOTHING:
            self._launch(function, args, kwargs, tree_leaves(result))
        return result

    def _on_device(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.device.type == self.device_type

    def _read(self, function, args) -> Any:
        """A value that is not there: nothing is wrong (False), a number is 0.0, an index or a count 1."""
        tensor = next(x for x in tree_leaves(args) if isinstance(x, Tensor))
        if self._on_device(tensor):
            read = HostRead(str(function), calling_place())
            # `tolist()` is one copy for real, and a read of every element here: with nothing started in between.
            state = (read, tensor.untyped_storage()._cdata, self.launches.total())
            if state != self._last_read:
                self.reads[read] += 1
            self._last_read = state
        if function is not aten._local_scalar_dense.default:
            return True  # equal, is_nonzero
        if tensor.dtype == torch.bool:
            return False
        return 0.0 if tensor.is_floating_point() else 1

    def _launch(self, function, args, kwargs, results) -> None:
        on_device = any(self._on_device(x) for x in results)
        if not on_device:
            if any(self._on_device(x) for x in tree_leaves(args)) and any(isinstance(x, Tensor) for x in results):
                waiting = not (
                    kwargs.get("non_blocking") or (function is aten.copy_.default and len(args) > 2 and args[2])
                )
                (self.reads if waiting else self.unread_copies)[HostRead(str(function), calling_place())] += 1
            return
        launch = Launch(*self._where(), str(function))
        self.launches[launch] += 1
        if function is DTYPE_COPY and launch.in_layers:
            source = args[0]
            self.dtype_copies[str(source.dtype)[6:], str(results[0].dtype)[6:]] += 1

    def _where(self) -> tuple[str, bool]:
        node = torch._C._current_autograd_node()
        if node is None:
            return self.phase, self._depth > 0
        if self._recomputing:
            return "recomputation", True
        if (variable := getattr(node, "variable", None)) is not None:
            return "backward", id(variable) in self._layer_parameters
        number = node._sequence_nr()
        at = bisect.bisect_right(self._spans, (number, float("inf"))) - 1
        return "backward", at >= 0 and number < self._spans[at][1]

    def _communicate(self, function, args) -> None:
        group = next((x for x in args if isinstance(x, torch.ScriptObject)), None)
        name = dist.ProcessGroup.unbox(group).group_name if group is not None else ""
        size = max((sum(_bytes(x) for x in tree_leaves(arg) if isinstance(x, Tensor)) for arg in args), default=0)
        kind = str(function).removeprefix("c10d.").removesuffix(".default").strip("_")
        key = Collective(self.groups.get(name, name), kind)
        calls, total = self.collectives.get(key, (0, 0))
        self.collectives[key] = Traffic(calls + 1, total + size)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
