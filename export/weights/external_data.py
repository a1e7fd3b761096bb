"""Stream the weights of a model into external data files, weight by weight, with the adapter merged on the way.

A weight is merged in FP32 and cast once, to the type that the graph gives it. At no time is more than one in memory,
and one that is stored as it is in the checkpoint (the vocabulary, the largest) passes through in blocks of rows. What
a quantized variant stores instead comes from its weight sources (``int8/weights.py``), one at a time.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from gircse.checkpoint.model_weights import BLOCK_ELEMENTS, rows_of_block
from gircse.export.graph.mixed_precision import FP16_MAX
from gircse.export.int8.qdq import fp16_scales
from gircse.export.int8.weights import WeightSource
from gircse.export.weights.layout import Fp16Copy, PlacedWeight, WeightLayout
from gircse.runtime.errors import ExportError
from gircse.runtime.manifest import FileEntry

_TORCH_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
}


class WrittenWeights(NamedTuple):
    """The data files.

    Attributes:
        entries: their sizes and SHA-256, taken while they were written, by name.
        copies_missing_reason: why they lack the FP16 copies, which only TensorRT reads; None if they have all it needs.
    """

    entries: dict[str, FileEntry]
    copies_missing_reason: str | None


def write_weights(layout: WeightLayout, folder: Path, *, on_bytes: Callable[[int], None]) -> WrittenWeights:
    """Write the data files. A copy that FP16 cannot hold costs the copies, not the files.

    Args:
        layout: the matched weights.
        folder: where to create them.
        on_bytes: called with the number of bytes after each block.

    Raises:
        CheckpointError: a value is NaN or infinite, or the adapter does not change a weight that it names.
        ExportError: a value is outside the range of its type.
    """
    source: WeightSource | None = None
    made: Mapping[str, Tensor] = {}
    with _HashedFiles([folder / name for name in layout.file_names], on_bytes) as files:
        for weight in layout.weights:
            files.move_to(weight.file, weight.offset)
            if weight.source is not None and weight.source is not source:  # its initializers follow one another
                source = weight.source
                made = source.tensors(layout.model.blocks)
            blocks = iter([made[weight.name]]) if weight.source is not None else copied_blocks(layout, weight)
            for block in blocks:
                stored = _packed(block, weight.dtype)
                files.write(stored.reshape(-1).view(torch.uint8).numpy().data)  # no copy
        without_copies = files.entries()
        try:
            for copy in layout.fp16_copies:
                files.move_to(copy.file, copy.offset)
                for values in _fp16_blocks(copy, files.path(copy.original.file)):
                    files.write(values.view(np.uint8).data)
        except ExportError as err:
            files.cut(without_copies)
            return WrittenWeights(without_copies, str(err))
        return WrittenWeights(files.entries(), None)


def external_tensors(layout: WeightLayout) -> dict[str, ir.ExternalTensor]:
    """Return the weights as ONNX external data in the graph's own folder, by initializer name."""
    return {weight.name: _external(weight, layout.file_names) for weight in layout.weights}


def engine_tensors(layout: WeightLayout) -> dict[str, ir.ExternalTensor]:
    """Return the weights of the graph for TensorRT: those that have a copy in FP16 are that copy."""
    copies = {copy.original.name: _external(copy.placed, layout.file_names) for copy in layout.fp16_copies}
    return external_tensors(layout) | copies


def copied_blocks(layout: WeightLayout, weight: PlacedWeight) -> Iterator[Tensor]:
    """Yield a weight that is copied as it is stored, (rows, ...) in its type, block by block.

    Raises:
        CheckpointError: a value is NaN or infinite, or the adapter does not change the weight.
        ExportError: a value is outside the range of the type.
    """
    shape = weight.checkpoint_shape
    # Transposing needs the whole tensor; any other weight can pass through in blocks of rows.
    rows = shape[0] if weight.transposed else min(shape[0], rows_of_block(shape))
    for block in layout.model.blocks(weight.tensor, rows_at_once=rows):
        narrow = block.to(_TORCH_TYPES[weight.dtype])
        if not torch.isfinite(narrow).all():
            raise _too_large(weight, float(block.abs().max()), tensor=weight.tensor)
        yield narrow.T.contiguous() if weight.transposed else narrow


def _packed(values: Tensor, dtype: ir.DataType) -> Tensor:
    """Pack INT4 numbers, which torch has as int8, two to a byte, the first one in its lower half, as ONNX does."""
    if dtype is not ir.DataType.INT4:
        return values
    low, high = values.reshape(-1, 2).unbind(1)
    return low.bitwise_and(15) | high.bitwise_left_shift(4)


class _HashedFiles:
    """Files that are written one after the other and hashed at the same time, in a second thread."""

    def __init__(self, paths: Sequence[Path], on_bytes: Callable[[int], None]) -> None:
        self._paths, self._on_bytes = paths, on_bytes
        self._finished: dict[str, FileEntry] = {}
        self._hasher = ThreadPoolExecutor(max_workers=1)
        self._open(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown()
        self._stream.close()

    def path(self, file: int) -> Path:
        """Return the path of a file; what was written to it so far can be read there."""
        self._stream.flush()
        return self._paths[file]

    def move_to(self, file: int, offset: int) -> None:
        """Go on at an offset further on, in this file or the next."""
        if file != self._file:
            self._finished = self.entries()
            self._stream.close()
            self._open(file)
        self.write(bytes(offset - self._stream.tell()))

    def write(self, data: bytes | memoryview) -> None:
        hashed = self._hasher.submit(self._digest.update, data)
        self._on_bytes(self._stream.write(data))
        hashed.result()  # the caller may use the memory again

    def entries(self) -> dict[str, FileEntry]:
        """Return what was written so far, by name of the file."""
        written = FileEntry(self._stream.tell(), self._digest.hexdigest())
        return {**self._finished, self._paths[self._file].name: written}

    def cut(self, entries: Mapping[str, FileEntry]) -> None:
        """Drop what was written after a call of ``entries``; nothing can be written any more."""
        self._stream.close()
        for path in self._paths[: self._file + 1]:
            if path.name in entries:
                os.truncate(path, entries[path.name].bytes)
            else:
                path.unlink()

    def _open(self, file: int) -> None:
        self._file, self._stream, self._digest = file, self._paths[file].open("wb"), hashlib.sha256()


def _fp16_blocks(copy: Fp16Copy, path: Path) -> Iterator[np.ndarray]:
    """Yield the values of a copy, read back from what was written."""
    original = copy.original
    count = math.prod(original.shape)
    step = count if copy.is_scale else BLOCK_ELEMENTS
    for start in range(0, count, step):
        exact = np.fromfile(path, np.float32, min(step, count - start), offset=original.offset + 4 * start)
        if copy.is_scale:
            yield fp16_scales(exact, original.name)
            continue
        with np.errstate(over="ignore"):  # infinity is refused below
            narrow = exact.astype(np.float16)
        if not np.isfinite(narrow).all():
            raise _too_large(original, float(np.abs(exact).max()), tensor=original.tensor or original.name)
        yield narrow


def _too_large(weight: PlacedWeight, magnitude: float, *, tensor: str) -> ExportError:
    return ExportError(
        tensor,
        f"has a magnitude of {magnitude:.6g}",
        f"the FP16 maximum is {FP16_MAX:.0f}",
        f"Export with --keep-float32 {tensor}, or with --precision bf16.",
    )


def _external(weight: PlacedWeight, names: Sequence[str]) -> ir.ExternalTensor:
    shape = ir.Shape(weight.shape)
    return ir.ExternalTensor(
        names[weight.file], weight.offset, weight.bytes, weight.dtype, name=weight.name, shape=shape, base_dir=""
    )
