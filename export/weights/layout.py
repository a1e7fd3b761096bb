"""Match the weights of the graphs with those of the model, and give each its place in the data file.

``external_data.py`` writes the file.
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
from gircse.runtime.errors import CheckpointError

ALIGNMENT_BYTES = 4096
"""Tensors start on page boundaries, so that a runtime can map them."""


@dataclass(frozen=True)
class PlacedWeight:
    """One weight of the graphs: what fills it, and where it stands in the data file.

    Attributes:
        name: initializer in the graphs.
        shape: its shape there.
        dtype: type in graph and data file.
        offset: first byte in the data file.
        tensor: weight of the model that is copied; empty for a weight with a ``source``.
        transposed: the copy is transposed.
        source: what makes it of one or more tensors; None for a copy.
    """

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType
    offset: int
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
        return int(self.dtype.itemsize) * math.prod(self.shape)


@dataclass(frozen=True)
class Fp16Copy:
    """An FP16 copy of an FP32 weight of the same file, for the graph that TensorRT engines are built from.

    Attributes:
        original: what is copied.
        offset: first byte of the copy.
        is_scale: it holds scales of integers, which must survive the rounding.
    """

    original: PlacedWeight
    offset: int
    is_scale: bool

    @property
    def placed(self) -> PlacedWeight:
        """The copy as a weight of its own, under the same name."""
        return dataclasses.replace(self.original, dtype=ir.DataType.FLOAT16, offset=self.offset)


@dataclass(frozen=True)
class WeightLayout:
    """Every weight of the graphs with its place in the data file; exists only if the model's fit them.

    Attributes:
        weights: in the order of the file.
        model: weights of the model.
        fp16_copies: what stands behind the weights, see :class:`Fp16Copy`.
    """

    weights: tuple[PlacedWeight, ...]
    model: ModelWeights
    fp16_copies: tuple[Fp16Copy, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Size of the data file."""
        last = self.fp16_copies[-1].placed if self.fp16_copies else self.weights[-1]
        return last.offset + last.bytes

    @classmethod
    def match(
        cls,
        initializers: Mapping[str, ir.Value],
        model: ModelWeights,
        *,
        sources: Sequence[WeightSource] = (),
    ) -> Self:
        """Match graph weights and the weights of the model one to one.

        Args:
            initializers: the weights of the graphs by name.
            model: weights of the model.
            sources: what makes the initializers that are not weights of the model.

        Raises:
            CheckpointError: a weight is missing or of another shape; the message names it.
        """
        made = {name: source for source in sources for name in source.initializers}
        read: dict[str, tuple[int, ...]] = {}
        weights: list[PlacedWeight] = []
        offset = 0
        for name, value in initializers.items():
            shape, dtype, source = _shape(value), value.dtype or ir.DataType.FLOAT, made.get(name)
            if source is not None:
                weight = PlacedWeight(name, shape, dtype, offset, source=source)
                read.update(source.reads)
            else:
                transposed = transpose_of(value)
                tensor = transposed or name
                weight = PlacedWeight(name, shape, dtype, offset, tensor, transposed=transposed is not None)
                read[tensor] = weight.checkpoint_shape
            weights.append(weight)
            offset = _aligned(offset + weight.bytes)
        for tensor, shape in read.items():
            if (found := model.shape(tensor)) != shape:
                raise CheckpointError(
                    "checkpoint",
                    f"has {tensor} of shape {list(found)}" if found is not None else f"has no tensor {tensor}",
                    f"the graph reads {list(shape)}",
                    "Check that config.json and weights belong together.",
                )
        return cls(tuple(weights), model)

    def with_fp16_copies(self, initializers: Mapping[str, ir.Value], *, scales: Collection[ir.Value]) -> Self:
        """Add copies for a second graph on the same file: of weights that it reads in FP16 and the file has in FP32.

        Args:
            initializers: weights of that graph by name; all of them are weights of this layout.
            scales: those that are scales of integers.
        """
        placed = {weight.name: weight for weight in self.weights}
        offset, copies = _aligned(self.total_bytes), []
        for name, value in initializers.items():
            if value.dtype is placed[name].dtype:
                continue
            if (placed[name].dtype, value.dtype) != (ir.DataType.FLOAT, ir.DataType.FLOAT16):
                raise ValueError(f"{name}: {value.dtype} of a weight that is stored as {placed[name].dtype}")
            copies.append(Fp16Copy(placed[name], offset, is_scale=value in scales))
            offset = _aligned(offset + copies[-1].placed.bytes)
        return dataclasses.replace(self, fp16_copies=tuple(copies))


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _shape(value: ir.Value) -> tuple[int, ...]:
    if value.shape is None:
        raise ValueError(f"{value.name}: initializer without a shape")
    return tuple(int(dim) for dim in value.shape.numpy())
