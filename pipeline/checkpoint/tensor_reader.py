"""A safetensors file that is read in slices, after its header was compared with what should be in it."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.files import FileError, Place, StorePath, open_regular, shown
from pipeline.checkpoint.store_tensors import StoreTensors

FLOATS = ("F64", "F32", "F16", "BF16")


class TensorReader:
    """An open safetensors file, on the disk or in a store, of which only what is asked for is fetched.

    Raises:
        FileError: it is no regular file or no safetensors file; the message names it.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        self.bytes_read = 0
        """Of all tensors that were asked for."""
        if not isinstance(path, StorePath):
            with open_regular(path):
                pass  # a fifo would never answer
        try:
            self._file = StoreTensors(path) if isinstance(path, StorePath) else safe_open(path, framework="pt")
            self.shapes, self.dtypes = {}, {}
            for name in self._file.keys():
                part = self._file.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
        except (OSError, FileError):
            raise
        except Exception as error:  # the library's own kinds, and what torch makes of an empty file
            raise FileError(f"{path} is damaged or holds no tensors (safetensors): {error}") from error

    @property
    def metadata(self) -> dict[str, str]:
        """Strings in the header."""
        return self._file.metadata() or {}

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        *,
        kinds: Mapping[str, tuple[str, ...]] | None = None,
        beside: tuple[str, ...] = (),
    ) -> None:
        """Compare with the tensors that should be in the file.

        Args:
            expected: their shapes, by name.
            kinds: the types that a tensor may have, by name; where there is none, those of floating-point numbers.
            beside: names that may be there as well.

        Raises:
            FileError: names the first that differs.
        """
        for name, shape in expected.items():
            if name not in self.shapes:
                raise FileError(f"{self.path} holds no tensor {shown(name)}")
            if self.shapes[name] != tuple(shape):
                raise FileError(f"{self.path}: {name} has shape {list(self.shapes[name])}, not {list(shape)}")
            allowed = (kinds or {}).get(name, FLOATS)
            if self.dtypes[name] not in allowed:
                raise FileError(f"{self.path}: {name} is of {self.dtypes[name]}, not {' or '.join(allowed)}")
        for name in self.shapes:
            if name not in expected and name not in beside:
                raise FileError(f"{self.path} holds a tensor {shown(name)}, which does not belong to it")

    def read(self, name: str, *ranges: slice) -> Tensor:
        """A tensor, or a part of it: of a range along each of the first dims.

        Raises:
            FileError: it cannot be read.
        """
        try:
            part = self._file.get_slice(name)[ranges] if ranges else self._file.get_tensor(name)
        except (SafetensorError, RuntimeError, ValueError, TypeError, IndexError) as error:
            raise FileError(f"{self.path}: cannot read {name}: {error}") from error
        self.bytes_read += part.numel() * part.element_size()
        return part
