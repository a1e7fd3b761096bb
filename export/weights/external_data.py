"""Stream the weights of a checkpoint into one external data file, tensor by tensor, with the LoRA merged on the way.

The merge (``lora.py`` has the formula) is computed in FP32 and cast once, to the type that the graph gives the weight.
At no time is more than one tensor in memory, and a tensor that is stored as it is in the checkpoint (the vocabulary,
the largest) passes through in blocks of rows. What an INT8 variant stores instead comes from its weight sources
(``int8/weights.py``), one at a time.
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

from gircse.checkpoint.lora import LoraPair
from gircse.checkpoint.safetensors_index import SafetensorsIndex
from gircse.export.graph.compose import EMBEDDING_TABLE, LM_HEAD
from gircse.export.graph.mixed_precision import FP16_MAX
from gircse.export.int8.qdq import fp16_scales
from gircse.export.int8.weights import WeightSource
from gircse.export.weights.layout import Fp16Copy, PlacedWeight, WeightLayout
from gircse.runtime.errors import CheckpointError, ExportError
from gircse.runtime.manifest import FileEntry

BLOCK_ELEMENTS = 1 << 24
"""Most elements of a tensor that are in memory at once, unless it has to be transposed."""

_TORCH_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
}


def estimate_bytes(base: SafetensorsIndex) -> tuple[int, int]:
    """Return the FP32 bytes of all tensors together, and of the largest piece that is in memory at once."""
    elements = {name: math.prod(stored.shape) for name, stored in base.entries.items()}
    pieces = [min(n, BLOCK_ELEMENTS) if name in (EMBEDDING_TABLE, LM_HEAD) else n for name, n in elements.items()]
    return 4 * sum(elements.values()), 4 * max(pieces, default=0)


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
                made = source.tensors(lambda tensor: merged_blocks(layout, tensor))
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
    rows = shape[0] if weight.transposed else min(shape[0], _rows_of_block(shape))
    for block in merged_blocks(layout, weight.tensor, rows_at_once=rows):
        narrow = block.to(_TORCH_TYPES[weight.dtype])
        if not torch.isfinite(narrow).all():
            raise _too_large(weight, float(block.abs().max()), tensor=weight.tensor)
        yield narrow.T.contiguous() if weight.transposed else narrow


def merged_blocks(layout: WeightLayout, tensor: str, *, rows_at_once: int | None = None) -> Iterator[Tensor]:
    """Yield a tensor of the checkpoint with the LoRA merged, FP32, some rows at a time.

    Args:
        layout: the matched weights.
        tensor: its name.
        rows_at_once: None takes as many as ``BLOCK_ELEMENTS`` allows.

    Raises:
        CheckpointError: a value is NaN or infinite, or the adapter does not change the tensor.
    """
    stored = layout.base.entries[layout.stored_name(tensor)]
    lora, changed = layout.lora(tensor), False
    factors = _factors(layout, lora)
    rows = rows_at_once or _rows_of_block(stored.shape)
    for start in range(0, stored.shape[0], rows):
        block = layout.base.read_rows(stored.name, slice(start, start + rows))
        if factors is not None:
            merged = block + factors[1][start : start + rows] @ factors[0]
            changed = changed or not torch.equal(merged, block)
            block = merged
        if not torch.isfinite(block).all():
            raise CheckpointError(
                str(stored.file),
                f"has NaN or infinity in {stored.name}",
                None,
                "The checkpoint or the adapter is damaged: download it again.",
            )
        yield block
    if lora is not None and not changed:
        raise CheckpointError(
            str(lora.file),
            f"has a {lora.b} that leaves {tensor} as it is",
            "a trained adapter changes every weight that it names",
            "The adapter is untrained or damaged: check --adapter.",
        )


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


def _factors(layout: WeightLayout, lora: LoraPair | None) -> tuple[Tensor, Tensor] | None:
    """Return A and scaling * B in FP32."""
    if lora is None or layout.adapter is None:
        return None
    index = layout.adapter.index
    return index.read_rows(lora.a), index.read_rows(lora.b) * lora.scaling


def _rows_of_block(shape: tuple[int, ...]) -> int:
    return max(1, BLOCK_ELEMENTS // math.prod(shape[1:]))
