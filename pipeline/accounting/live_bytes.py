"""Counts the bytes of the tensors that are alive, exactly, whatever the allocator does with them."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Inside `with LiveBytes() as live:`, every storage made by an operation counts until it is freed.

    This sees forward, recomputation and backward alike, and counts a storage once however many views it has. It does
    not see what a kernel allocates and frees inside itself, nor tensors from before. It is slow: take times elsewhere.

    Args:
        device_type: count the tensors of these devices alone; None for all.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self.device_type = device_type
        self.bytes = 0
        """Alive now."""
        self.peak = 0
        self.label = ""
        """What is made from now on is counted under."""
        self.by_label: Counter[str] = Counter()
        self.peak_by_label: Counter[str] = Counter()
        self._storages: dict[int, tuple[weakref.ref, str]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and self.device_type in (None, tensor.device.type):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._storages:
                    self._add(storage)
        return result

    def relabel(self, tensor: torch.Tensor, label: str) -> None:
        """Count `tensor`'s storage under `label` from now on, if it is counted at all."""
        key = tensor.untyped_storage()._cdata
        if key in self._storages:
            reference, old = self._storages[key]
            size = tensor.untyped_storage().nbytes()
            self._storages[key] = reference, label
            self.by_label[old] -= size
            self.by_label[label] += size

    def forget_peak(self) -> None:
        """Look for the peak from here on."""
        self.peak, self.peak_by_label = self.bytes, self.by_label.copy()

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: weakref.ref) -> None:
            _, label = self._storages.pop(key)
            self.bytes -= size
            self.by_label[label] -= size

        self._storages[key] = weakref.ref(storage, freed), self.label
        self.bytes += size
        self.by_label[self.label] += size
        if self.bytes > self.peak:
            self.peak, self.peak_by_label = self.bytes, self.by_label.copy()
