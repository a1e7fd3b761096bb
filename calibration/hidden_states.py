"""Hidden states of all batches between two decoder layers, in a mapped file: with many long texts they are GiB."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class HiddenStates:
    """The states (batch, tokens, hidden) that go into one layer, by the number of the batch."""

    def __init__(self, path: Path, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> None:
        """Map a file, which is created, or keeps what it holds if it is there.

        Args:
            path: of the file.
            shapes: of every batch.
            dtype: of the states.

        Raises:
            OSError: it cannot be written.
        """
        self._shapes = [torch.Size(shape) for shape in shapes]
        self._starts = [0]
        for shape in self._shapes:
            self._starts.append(self._starts[-1] + shape.numel())
        with path.open("ab") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and not a signal on a write into memory
                os.posix_fallocate(file.fileno(), 0, self._starts[-1] * dtype.itemsize)
        self._values = torch.from_file(str(path), shared=True, size=self._starts[-1], dtype=dtype)

    def __getitem__(self, batch: int) -> Tensor:
        """Return the states of a batch; what is written into them is written to the file."""
        return self._values[self._starts[batch] : self._starts[batch + 1]].view(self._shapes[batch])
