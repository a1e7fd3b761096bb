"""Match the weights of the graphs with those of the model, and give each its place in the data files.

There is one file, unless a store limits the size of files. ``external_data.py`` writes them.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import onnx_ir as ir

from gircse.checkpoint.model_weights import ModelWeights
from gircse.export.graph.simplify import transpose_of
from gircse.export.int8.weights import WeightSource
from gircse.reporting.sizes import gib
from gircse.runtime.errors import CheckpointError, OptionError

ALIGNMENT_BYTES = 4096
"""Tensors start on page boundaries, so that a runtime can map them."""


@dataclass(frozen=True)
class PlacedWeight:
    """One weight of the graphs: what fills it, and where it stands in the data files.

    Attributes:
        name: initializer in the graphs.
        shape: its shape there.
        dtype: type in graph and data file.
        offset: first byte in its data file.
        file: number of its data file.
        tensor: weight of the model that is copied; empty for a weight with a ``source``.
        transposed: the copy is transposed.
        source: what makes it of one or more tensors; None for a copy.
    """

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType
    offset: int
    file: int = 0
    tensor: str = ""
    transposed: bool = False
    source: WeightSource | None = None

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        """Shape of ``tensor``."""
        return tuple(reversed(self.shape)) if self.transposed else self.shape

    @property
    def bytes(self) -> int:
        """Size in the data file."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Fp16Copy:
    """An FP16 copy of an FP32 weight of the same file, for the graph that TensorRT engines are built from.

    Attributes:
        original: what is copied.
        offset: first byte of the copy in its data file.
        file: number of its data file.
        is_scale: it holds scales of integers, which must survive the rounding.
    """

    original: PlacedWeight
    offset: int
    file: int
    is_scale: bool

    @property
    def placed(self) -> PlacedWeight:
        """The copy as a weight of its own, under the same name."""
        return dataclasses.replace(self.original, dtype=ir.DataType.FLOAT16, offset=self.offset, file=self.file)


@dataclass(frozen=True)
class WeightLayout:
    """Every weight of the graphs with its place in the data files; exists only if the model's fit them.

    Attributes:
        weights: in the order of the files.
        model: weights of the model.
        max_file_bytes: no file is larger; None for one file.
        fp16_copies: what stands behind the weights, see :class:`Fp16Copy`.
    """

    weights: tuple[PlacedWeight, ...]
    model: ModelWeights
    max_file_bytes: int | None = None
    fp16_copies: tuple[Fp16Copy, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Size of the data files."""
        placed = [*self.weights, *(copy.placed for copy in self.fp16_copies)]
        ends = {weight.file: weight.offset + weight.bytes for weight in placed}  # the last one of each file counts
        return sum(ends.values())

    @property
    def file_names(self) -> tuple[str, ...]:
        """Names of the data files."""
        files = 1 + (self.fp16_copies[-1].file if self.fp16_copies else self.weights[-1].file)
        if files == 1:
            return ("weights.bin",)
        return tuple(f"weights-{number:05}.bin" for number in range(1, files + 1))

    @classmethod
    def match(
        cls,
        initializers: Mapping[str, ir.Value],
        model: ModelWeights,
        *,
        sources: Sequence[WeightSource] = (),
        max_file_bytes: int | None = None,
    ) -> Self:
        """Match graph weights and the weights of the model one to one.

        Args:
            initializers: the weights of the graphs by name.
            model: weights of the model.
            sources: what makes the initializers that are not weights of the model.
            max_file_bytes: no data file may be larger; None for one file.

        Raises:
            CheckpointError: a weight is missing or of another shape; the message names it.
            OptionError: a weight is larger than a file may be.
        """
        made = {name: source for source in sources for name in source.initializers}
        read: dict[str, tuple[int, ...]] = {}
        weights: list[PlacedWeight] = []
        places = _Places(max_file_bytes)
        for name, value in initializers.items():
            shape, dtype, source = _shape(value), value.dtype or ir.DataType.FLOAT, made.get(name)
            file, offset = places.take(name, tensor_bytes(dtype, shape))
            if source is not None:
                weight = PlacedWeight(name, shape, dtype, offset, file, source=source)
                read.update(source.reads)
            else:
                transposed = transpose_of(value)
                tensor = transposed or name
                weight = PlacedWeight(name, shape, dtype, offset, file, tensor, transposed=transposed is not None)
                read[tensor] = weight.checkpoint_shape
            weights.append(weight)
        for tensor, shape in read.items():
            if (found := model.shape(tensor)) != shape:
                raise CheckpointError(
                    "checkpoint",
                    f"has {tensor} of shape {list(found)}" if found is not None else f"has no tensor {tensor}",
                    f"the graph reads {list(shape)}",
                    "Check that config.json and weights belong together.",
                )
        return cls(tuple(weights), model, max_file_bytes)

    def with_fp16_copies(self, initializers: Mapping[str, ir.Value], *, scales: Collection[ir.Value]) -> Self:
        """Add copies for a second graph on the same file: of weights that it reads in FP16 and the file has in FP32.

        Args:
            initializers: weights of that graph by name; all of them are weights of this layout.
            scales: those that are scales of integers.
        """
        placed = {weight.name: weight for weight in self.weights}
        last = self.weights[-1]
        places = _Places(self.max_file_bytes, file=last.file, end=last.offset + last.bytes)
        copies = []
        for name, value in initializers.items():
            if value.dtype is placed[name].dtype:
                continue
            if (placed[name].dtype, value.dtype) != (ir.DataType.FLOAT, ir.DataType.FLOAT16):
                raise ValueError(f"{name}: {value.dtype} of a weight that is stored as {placed[name].dtype}")
            file, offset = places.take(name, placed[name].bytes // 2)
            copies.append(Fp16Copy(placed[name], offset, file, is_scale=value in scales))
        return dataclasses.replace(self, fp16_copies=tuple(copies))


def tensor_bytes(dtype: ir.DataType, shape: Sequence[int]) -> int:
    """Return the size of a tensor in a data file; two INT4 numbers share a byte."""
    return math.ceil(dtype.itemsize * math.prod(shape))


class _Places:
    """Hands out places in the data files, one behind the other."""

    def __init__(self, max_file_bytes: int | None, *, file: int = 0, end: int = 0) -> None:
        self._most, self._file, self._end = max_file_bytes, file, end

    def take(self, name: str, size: int) -> tuple[int, int]:
        """Return file and offset for a weight.

        Raises:
            OptionError: it is larger than a file may be.
        """
        if self._most is not None and size > self._most:
            raise OptionError(
                "--max-shard-gib",
                f"is {self._most / 2**30:.6g}",
                f"{name} alone has {gib(size)}, and a weight is never split",
                "Raise it.",
            )
        offset = _aligned(self._end)
        if self._most is not None and offset + size > self._most:
            self._file, offset = self._file + 1, 0
        self._end = offset + size
        return self._file, offset


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _shape(value: ir.Value) -> tuple[int, ...]:
    if value.shape is None:
        raise ValueError(f"{value.name}: initializer without a shape")
    return tuple(int(dim) for dim in value.shape.numpy())
