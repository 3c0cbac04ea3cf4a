"""Counts the bytes of the tensors that are alive, exactly, whatever the allocator does with them."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Inside `with LiveBytes() as live:`, every storage made by an operation counts until it is freed.

    This sees forward, recomputation and backward alike, and counts a storage once however many views it has. It does
    not see what a kernel allocates and frees inside itself, nor tensors from before. It is slow: take times elsewhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        """Alive now."""
        self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._storages:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: weakref.ref) -> None:
            del self._storages[key]
            self.bytes -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
