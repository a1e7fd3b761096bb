"""Stream the weights of a model into one external data file, weight by weight, with the adapter merged on the way.

A weight is merged in FP32 and cast once, to the type that the graph gives it. At no time is more than one in memory,
and one that is stored as it is in the checkpoint (the vocabulary, the largest) passes through in blocks of rows. What
an INT8 variant stores instead comes from its weight sources (``int8/weights.py``), one at a time.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

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
    """A data file.

    Attributes:
        entry: its size and SHA-256, taken while it was written.
        copies_missing_reason: why it lacks the FP16 copies, which only TensorRT reads; None if it has all it needs.
    """

    entry: FileEntry
    copies_missing_reason: str | None


def write_weights(layout: WeightLayout, path: Path, *, on_bytes: Callable[[int], None]) -> WrittenWeights:
    """Write the data file. A copy that FP16 cannot hold costs the copies, not the file.

    Args:
        layout: the matched weights.
        path: file to create.
        on_bytes: called with the number of bytes after each block.

    Raises:
        CheckpointError: a value is NaN or infinite, or the adapter does not change a weight that it names.
        ExportError: a value is outside the range of its type.
    """
    source: WeightSource | None = None
    made: Mapping[str, Tensor] = {}
    with path.open("wb") as stream:
        file = _HashedFile(stream, on_bytes)
        for weight in layout.weights:
            file.pad_to(weight.offset)
            if weight.source is not None and weight.source is not source:  # its initializers follow one another
                source = weight.source
                made = source.tensors(layout.model.blocks)
            for block in copied_blocks(layout, weight) if weight.source is None else [made[weight.name]]:
                file.write(block.reshape(-1).view(torch.uint8).numpy().data)  # no copy
        stream.flush()
        without_copies = FileEntry(stream.tell(), file.sha256)
        try:
            for copy in layout.fp16_copies:
                file.pad_to(copy.offset)
                for values in _fp16_blocks(copy, path):
                    file.write(values.view(np.uint8).data)
        except ExportError as err:
            stream.truncate(without_copies.bytes)
            return WrittenWeights(without_copies, str(err))
        return WrittenWeights(FileEntry(stream.tell(), file.sha256), None)


def external_tensors(layout: WeightLayout, location: str) -> dict[str, ir.ExternalTensor]:
    """Return the weights as ONNX external data, by initializer name.

    Args:
        layout: the matched weights.
        location: name of the data file, relative to the graph's folder.
    """
    return {weight.name: _external(weight, location) for weight in layout.weights}


def engine_tensors(layout: WeightLayout, location: str) -> dict[str, ir.ExternalTensor]:
    """Return the weights of the graph for TensorRT: those that have a copy in FP16 are that copy."""
    copies = {copy.original.name: _external(copy.placed, location) for copy in layout.fp16_copies}
    return external_tensors(layout, location) | copies


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


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, stream: BinaryIO, on_bytes: Callable[[int], None]) -> None:
        self._stream, self._on_bytes, self._digest = stream, on_bytes, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._on_bytes(self._stream.write(data))

    def pad_to(self, offset: int) -> None:
        padding = bytes(offset - self._stream.tell())
        self._digest.update(padding)
        self._stream.write(padding)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


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


def _external(weight: PlacedWeight, location: str) -> ir.ExternalTensor:
    shape = ir.Shape(weight.shape)
    return ir.ExternalTensor(
        location, weight.offset, weight.bytes, weight.dtype, name=weight.name, shape=shape, base_dir=""
    )
