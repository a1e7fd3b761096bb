"""Match the weights of the graphs with the checkpoint and the adapter, and give each its place in the data file.

Reads only headers, so a checkpoint or an adapter that does not fit is refused before anything is written.
``external_data.py`` writes the file.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import onnx_ir as ir

from gircse.checkpoint.lora import LoraAdapter, LoraPair
from gircse.checkpoint.safetensors_index import SafetensorsIndex
from gircse.export.graph.compose import EMBEDDING_TABLE, LM_HEAD
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
        tensor: tensor of the checkpoint that is copied; empty for a weight with a ``source``.
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
    """Every weight of the graphs with its place in the data file; exists only if checkpoint and adapter fit them.

    Attributes:
        weights: in the order of the file.
        base: tensors of the checkpoint.
        adapter: the LoRA, or None.
        fp16_copies: what stands behind the weights, see :class:`Fp16Copy`.
    """

    weights: tuple[PlacedWeight, ...]
    base: SafetensorsIndex
    adapter: LoraAdapter | None
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
        base: SafetensorsIndex,
        adapter_directory: Path | None,
        *,
        unneeded: Collection[str],
        sources: Sequence[WeightSource] = (),
    ) -> Self:
        """Match graph weights, checkpoint tensors and adapter tensors one to one.

        Args:
            initializers: the weights of the graphs by name.
            base: tensors of the checkpoint.
            adapter_directory: folder of the LoRA, or None.
            unneeded: tensors that the checkpoint may have and the graphs do not read.
            sources: what makes the initializers that are not tensors of the checkpoint.

        Raises:
            CheckpointError: a tensor is missing, left over, or of another shape; the message names it.
        """
        adapter = LoraAdapter(adapter_directory) if adapter_directory is not None else None
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
        layout = cls(tuple(weights), base, adapter)
        for tensor, shape in read.items():
            _check_tensor(base, layout.stored_name(tensor), shape)
            layout._check_adapter_shapes(tensor, shape)
        _check_leftovers(base, set(base.entries) - set(map(layout.stored_name, read)) - set(unneeded))
        if adapter is not None and (unknown := set(adapter.pairs) - set(read)):
            raise CheckpointError(
                str(adapter_directory),
                f"adapts {min(unknown)} ({len(unknown)} such)",
                "the model has no such weight",
                "The adapter belongs to another model: check --adapter.",
            )
        return layout

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

    def stored_name(self, tensor: str) -> str:
        """Return the name that a tensor has in the checkpoint; a tied table may be stored as lm_head."""
        return LM_HEAD if tensor == EMBEDDING_TABLE and tensor not in self.base.entries else tensor

    def lora(self, tensor: str) -> LoraPair | None:
        """Return the LoRA of a tensor of the checkpoint, if it has one."""
        return self.adapter.pairs.get(tensor) if self.adapter is not None else None

    def _check_adapter_shapes(self, tensor: str, shape: tuple[int, ...]) -> None:
        """Refuse LoRA factors that do not multiply to the tensor's shape."""
        lora = self.lora(tensor)
        if lora is None or self.adapter is None:
            return
        a, b = (self.adapter.index.entries[name].shape for name in (lora.a, lora.b))
        if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != shape or a[0] != b[1]:
            raise CheckpointError(
                str(lora.file),
                f"has {lora.a} {list(a)} and {lora.b} {list(b)}",
                f"their product must be {tensor} {list(shape)}",
                "The adapter belongs to another model: check --adapter.",
            )


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _shape(value: ir.Value) -> tuple[int, ...]:
    if value.shape is None:
        raise ValueError(f"{value.name}: initializer without a shape")
    return tuple(int(dim) for dim in value.shape.numpy())


def _check_tensor(base: SafetensorsIndex, tensor: str, shape: tuple[int, ...]) -> None:
    if tensor not in base.entries:
        raise CheckpointError(
            "checkpoint",
            f"has no tensor {tensor}",
            None,
            "It is incomplete, or its config.json belongs to another model: download it again.",
        )
    stored = base.entries[tensor]
    if stored.shape != shape:
        raise CheckpointError(
            str(stored.file),
            f"has {tensor} of shape {list(stored.shape)}",
            f"config.json says {list(shape)}",
            "The config belongs to another model: download the checkpoint again.",
        )


def _check_leftovers(base: SafetensorsIndex, leftovers: set[str]) -> None:
    # Old checkpoints store the rotary frequencies, which the config determines.
    unknown = sorted(name for name in leftovers if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise CheckpointError(
            str(base.entries[unknown[0]].file),
            f"has a tensor {unknown[0]} ({len(unknown)} such) that has no place in the graph",
            None,
            "Check that config.json and weights belong together.",
        )
