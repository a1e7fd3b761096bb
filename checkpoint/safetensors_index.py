"""The tensors of a set of safetensors files, read a few rows at a time."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gircse.runtime.errors import CheckpointError

_FLOAT_TYPES = ("F32", "F16", "BF16")


class StoredTensor(NamedTuple):
    """Where a tensor is stored: file, name in the file, shape."""

    file: Path
    name: str
    shape: tuple[int, ...]


class SafetensorsIndex:
    """Where each tensor of a set of safetensors files is stored.

    Attributes:
        entries: tensor name to its place, in the order of the files and of the places in each.
        bytes_read: of tensors, so far.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Read the headers.

        Raises:
            CheckpointError: a file is damaged or truncated, holds a tensor of another type than F32, F16 or BF16, or
                holds one that another file holds too.
        """
        self.entries: dict[str, StoredTensor] = {}
        self.bytes_read = 0
        for path in files:
            with open_safetensors(path) as file:
                for name in file.offset_keys():
                    view = file.get_slice(name)
                    if view.get_dtype() not in _FLOAT_TYPES:
                        raise CheckpointError(
                            str(path),
                            f"holds {name} as {view.get_dtype()}",
                            f"weights can be {', '.join(_FLOAT_TYPES)}",
                            "Use a checkpoint that is not quantized.",
                        )
                    if name in self.entries:
                        raise CheckpointError(
                            str(path), f"holds {name}", f"{self.entries[name].file.name} does too", "Remove one."
                        )
                    self.entries[name] = StoredTensor(path, name, tuple(view.get_shape()))

    def renamed(self, stored: Mapping[str, str]) -> Self:
        """Return an index of some of the tensors under other names; ``stored`` is new name to old."""
        index = copy.copy(self)
        places = {name: place for place, name in enumerate(self.entries)}
        in_order = sorted(stored.items(), key=lambda names: places[names[1]])
        index.entries = {name: self.entries[old] for name, old in in_order}
        return index

    def read_rows(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Read rows of a tensor as FP32. The file is closed again, so its pages do not stay mapped."""
        stored = self.entries[name]
        with open_safetensors(stored.file) as file:
            block: Tensor = file.get_slice(stored.name)[rows]
            self.bytes_read += block.nbytes
            return block.to(torch.float32, copy=True)

    def gather(self, name: str, numbers: Tensor) -> Tensor:
        """Read some rows (n, ...) as FP32, whose numbers are (n,) int64."""
        stored = self.entries[name]
        with open_safetensors(stored.file) as file:
            view = file.get_slice(stored.name)
            rows = torch.cat([view[number : number + 1] for number in numbers.tolist()])
        self.bytes_read += rows.nbytes
        return rows.float()

    def copy_to(self, name: str, out: Tensor) -> None:
        """Read a whole tensor into another of its shape, which converts it; nothing else is allocated."""
        stored = self.entries[name]
        with open_safetensors(stored.file) as file:
            tensor = file.get_tensor(stored.name)
            self.bytes_read += tensor.nbytes
            out.copy_(tensor)


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file as a context manager; its header is read at once.

    Raises:
        CheckpointError: it is missing, truncated or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as err:
        raise CheckpointError(
            str(path),
            f"cannot be read as safetensors: {err}",
            None,
            "It is truncated or damaged: download it again.",
        ) from err
