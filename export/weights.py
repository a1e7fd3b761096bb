"""Stream the weights of a checkpoint into one external data file, tensor by tensor, with the LoRA merged on the way.

The merge (``lora.py`` has the formula) is computed in FP32 and cast once, to the type that the graph gives the weight.
At no time is more than one tensor in memory;
a tensor that is stored as it is in the checkpoint (the vocabulary, the largest) passes through in blocks of rows.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import onnx_ir as ir
import torch
from torch import Tensor

from gircse.export.compose import EMBEDDING_TABLE, LM_HEAD
from gircse.export.lora import LoraAdapter, LoraPair
from gircse.export.safetensors_index import SafetensorsIndex
from gircse.export.simplify import TRANSPOSED_SUFFIX
from gircse.runtime.bundle import FileEntry
from gircse.runtime.errors import CheckpointError, ExportError

ALIGNMENT_BYTES = 4096
"""Tensors start on page boundaries, so that a runtime can map them."""

BLOCK_ELEMENTS = 1 << 24
"""Most elements of a tensor that are in memory at once, unless it has to be transposed."""


_TORCH_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


@dataclass(frozen=True)
class PlannedWeight:
    """One graph weight: which checkpoint tensor fills it and how.

    Attributes:
        name: initializer in the graphs.
        source: tensor in the checkpoint.
        shape: shape in the checkpoint.
        transposed: stored as the transpose.
        lora: the pair to merge, or None.
        offset: first byte in the data file.
        dtype: type in the data file.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    transposed: bool
    lora: LoraPair | None
    offset: int
    dtype: ir.DataType

    @property
    def bytes(self) -> int:
        """Size in the data file."""
        return int(self.dtype.itemsize) * math.prod(self.shape)


@dataclass(frozen=True)
class WeightPlan:
    """Every weight of the graphs with its place in the data file; exists only if checkpoint and adapter fit them."""

    weights: tuple[PlannedWeight, ...]
    base: SafetensorsIndex
    adapter: LoraAdapter | None

    @property
    def total_bytes(self) -> int:
        """Size of the data file."""
        return self.weights[-1].offset + self.weights[-1].bytes

    @classmethod
    def build(
        cls, initializers: Mapping[str, ir.Value], base: SafetensorsIndex, adapter_directory: Path | None, *, tied: bool
    ) -> Self:
        """Match graph weights, checkpoint tensors and adapter tensors one to one.

        Args:
            initializers: the weights of the graphs by name.
            base: tensors of the checkpoint.
            adapter_directory: folder of the LoRA, or None.
            tied: whether lm_head is the embedding table, which the file may hold under either name.

        Raises:
            CheckpointError: a tensor is missing, left over, or of another shape; the message names it.
        """
        adapter = LoraAdapter(adapter_directory) if adapter_directory is not None else None
        pairs = dict(adapter.pairs) if adapter is not None else {}
        unused = set(base.entries)
        weights: list[PlannedWeight] = []
        offset = 0
        for name, value in initializers.items():
            tensor = name.removesuffix(TRANSPOSED_SUFFIX)
            transposed = tensor != name
            shape = _checkpoint_shape(value, transposed=transposed)
            source = LM_HEAD if tied and tensor == EMBEDDING_TABLE and tensor not in base.entries else tensor
            _check_tensor(base, source, shape)
            dtype = value.dtype or ir.DataType.FLOAT
            weights.append(PlannedWeight(name, source, shape, transposed, pairs.pop(tensor, None), offset, dtype))
            offset += -(-weights[-1].bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            unused.discard(source)
        _check_leftovers(base, unused, tied=tied)
        if pairs:
            raise CheckpointError(
                f"{adapter_directory}: adapts {min(pairs)} ({len(pairs)} such) | weights of this model | "
                "the adapter belongs to another model: check --adapter"
            )
        plan = cls(tuple(weights), base, adapter)
        for weight in weights:
            plan.check_adapter_shapes(weight)
        return plan

    def check_adapter_shapes(self, weight: PlannedWeight) -> None:
        """Refuse LoRA factors that do not multiply to the weight's shape."""
        if weight.lora is None or self.adapter is None:
            return
        a, b = (self.adapter.index.entries[name].shape for name in (weight.lora.a, weight.lora.b))
        if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != weight.shape or a[0] != b[1]:
            raise CheckpointError(
                f"{weight.lora.file}: {weight.lora.a} {list(a)} and {weight.lora.b} {list(b)} | factors of "
                f"{weight.source} {list(weight.shape)} | the adapter belongs to another model: check --adapter"
            )

    def blocks(self, weight: PlannedWeight) -> Iterator[Tensor]:
        """Yield a weight as it is stored, (rows, ...) in its type, block by block.

        Raises:
            CheckpointError: a value is NaN or infinite, or the adapter does not change the weight.
            ExportError: a value is outside the range of the type.
        """
        changed = False
        rows = _rows_at_once(weight)
        factors = self._factors(weight)
        for start in range(0, weight.shape[0], rows):
            block = self.base.read_rows(weight.source, slice(start, start + rows))
            if factors is not None:
                merged = block + factors[1][start : start + rows] @ factors[0]
                changed = changed or not torch.equal(merged, block)
                block = merged
            if not torch.isfinite(block).all():
                raise CheckpointError(
                    f"{self.base.entries[weight.source].file}: {weight.source} holds NaN or infinity | finite weights | "
                    "the checkpoint or the adapter is damaged: download it again"
                )
            narrow = block.to(_TORCH_TYPES[weight.dtype])
            if not torch.isfinite(narrow).all():
                raise ExportError(
                    f"{weight.source}: magnitude {float(block.abs().max()):.6g} | FP16 holds up to 65504 | "
                    f"--precision bf16, or --keep-float32 {weight.name.removesuffix(TRANSPOSED_SUFFIX)}"
                )
            yield narrow.T.contiguous() if weight.transposed else narrow
        if weight.lora is not None and not changed:
            raise CheckpointError(
                f"{weight.lora.file}: {weight.lora.b} leaves {weight.source} as it is | an adapter that changes every "
                "weight it names | the adapter is untrained or damaged: check --adapter"
            )

    def _factors(self, weight: PlannedWeight) -> tuple[Tensor, Tensor] | None:
        """Return A and scaling * B in FP32."""
        if weight.lora is None or self.adapter is None:
            return None
        index = self.adapter.index
        return index.read_rows(weight.lora.a), index.read_rows(weight.lora.b) * weight.lora.scaling


def estimate_bytes(base: SafetensorsIndex) -> tuple[int, int]:
    """Return the FP32 bytes of all tensors together, and of the largest piece that is in memory at once."""
    elements = {name: math.prod(stored.shape) for name, stored in base.entries.items()}
    pieces = [min(n, BLOCK_ELEMENTS) if name in (EMBEDDING_TABLE, LM_HEAD) else n for name, n in elements.items()]
    return 4 * sum(elements.values()), 4 * max(pieces, default=0)


def write_weights(plan: WeightPlan, path: Path, *, on_bytes: Callable[[int], None]) -> FileEntry:
    """Write the data file.

    Args:
        plan: the matched weights.
        path: file to create.
        on_bytes: called with the number of bytes after each block.

    Returns:
        Size and SHA-256, taken while writing.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for weight in plan.weights:
            padding = bytes(weight.offset - file.tell())
            file.write(padding)
            digest.update(padding)
            for block in plan.blocks(weight):
                data = block.reshape(-1).view(torch.uint8).numpy().data  # no copy
                file.write(data)
                digest.update(data)
                on_bytes(len(data))
        return FileEntry(file.tell(), digest.hexdigest())


def external_tensors(plan: WeightPlan, location: str) -> dict[str, ir.ExternalTensor]:
    """Return the weights as ONNX external data, by initializer name.

    Args:
        plan: the matched weights.
        location: name of the data file, relative to the graph's folder.
    """
    return {
        weight.name: ir.ExternalTensor(
            location,
            weight.offset,
            weight.bytes,
            weight.dtype,
            name=weight.name,
            shape=ir.Shape(tuple(reversed(weight.shape)) if weight.transposed else weight.shape),
            base_dir="",
        )
        for weight in plan.weights
    }


def _rows_at_once(weight: PlannedWeight) -> int:
    """Transposing needs the whole tensor; any other weight can pass through in blocks of rows."""
    if weight.transposed:
        return weight.shape[0]
    return min(weight.shape[0], max(1, BLOCK_ELEMENTS // math.prod(weight.shape[1:])))


def _checkpoint_shape(value: ir.Value, *, transposed: bool) -> tuple[int, ...]:
    if value.shape is None:
        raise ValueError(f"{value.name}: initializer without a shape")
    dims = tuple(int(dim) for dim in value.shape.numpy())
    return tuple(reversed(dims)) if transposed else dims


def _check_tensor(base: SafetensorsIndex, source: str, shape: tuple[int, ...]) -> None:
    if source not in base.entries:
        raise CheckpointError(
            f"checkpoint: no tensor {source} | every weight of the graph | the checkpoint is incomplete or its "
            "config.json belongs to another model"
        )
    stored = base.entries[source]
    if stored.shape != shape:
        raise CheckpointError(
            f"{stored.file}: {source} has shape {list(stored.shape)} | {list(shape)} by config.json | "
            "the config belongs to another model: download the checkpoint again"
        )


def _check_leftovers(base: SafetensorsIndex, unused: set[str], *, tied: bool) -> None:
    # Old checkpoints store the rotary frequencies, which the config determines; a tied lm_head may be stored twice.
    known = {LM_HEAD} if tied else set()
    unknown = sorted(name for name in unused - known if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise CheckpointError(
            f"{base.entries[unknown[0]].file}: tensor {unknown[0]} ({len(unknown)} such) has no place in the graph | "
            "exactly the weights that config.json describes | check that config and weights belong together"
        )
