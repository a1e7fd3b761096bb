"""Stream the weights of a checkpoint into one external data file, tensor by tensor, with the LoRA merged on the way.

The merge (``lora.py`` has the formula) is computed in FP32 and cast once, to the type that the graph gives the weight.
At no time is more than one tensor in memory;
a tensor that is stored as it is in the checkpoint (the vocabulary, the largest) passes through in blocks of rows.
What an INT8 variant stores instead comes from recipes (``int8_weights.py``), one at a time.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import onnx_ir as ir
import torch
from torch import Tensor

from gircse.checkpoint.lora import LoraAdapter, LoraPair
from gircse.checkpoint.safetensors_index import SafetensorsIndex
from gircse.export.graph.compose import EMBEDDING_TABLE, LM_HEAD
from gircse.export.graph.simplify import TRANSPOSED_SUFFIX
from gircse.export.int8.weights import WeightSource
from gircse.runtime.errors import CheckpointError, ExportError
from gircse.runtime.manifest import FileEntry

ALIGNMENT_BYTES = 4096
"""Tensors start on page boundaries, so that a runtime can map them."""

BLOCK_ELEMENTS = 1 << 24
"""Most elements of a tensor that are in memory at once, unless it has to be transposed."""


_TORCH_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
}


@dataclass(frozen=True)
class PlacedWeight:
    """One graph weight: which checkpoint tensor fills it and how.

    Attributes:
        name: initializer in the graphs.
        source: tensor in the checkpoint.
        shape: shape in the checkpoint; of a recipe's weight, in the graphs.
        transposed: stored as the transpose.
        offset: first byte in the data file.
        dtype: type in the data file.
        recipe: what makes it of one or more tensors, in place of ``source``; None for a weight that is copied.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    transposed: bool
    offset: int
    dtype: ir.DataType
    recipe: WeightSource | None = None

    @property
    def bytes(self) -> int:
        """Size in the data file."""
        return int(self.dtype.itemsize) * math.prod(self.shape)


@dataclass(frozen=True)
class WeightLayout:
    """Every weight of the graphs with its place in the data file; exists only if checkpoint and adapter fit them."""

    weights: tuple[PlacedWeight, ...]
    base: SafetensorsIndex
    adapter: LoraAdapter | None

    @property
    def total_bytes(self) -> int:
        """Size of the data file."""
        return self.weights[-1].offset + self.weights[-1].bytes

    @classmethod
    def build(
        cls,
        initializers: Mapping[str, ir.Value],
        base: SafetensorsIndex,
        adapter_directory: Path | None,
        *,
        tied: bool,
        recipes: Sequence[WeightSource] = (),
    ) -> Self:
        """Match graph weights, checkpoint tensors and adapter tensors one to one.

        Args:
            initializers: the weights of the graphs by name.
            base: tensors of the checkpoint.
            adapter_directory: folder of the LoRA, or None.
            tied: whether lm_head is the embedding table, which the file may hold under either name.
            recipes: what makes the initializers that are no tensors of the checkpoint.

        Raises:
            CheckpointError: a tensor is missing, left over, or of another shape; the message names it.
        """
        adapter = LoraAdapter(adapter_directory) if adapter_directory is not None else None
        made = {name: recipe for recipe in recipes for name in recipe.shapes}
        sources: dict[str, tuple[int, ...]] = {}
        weights: list[PlacedWeight] = []
        offset = 0
        for name, value in initializers.items():
            dtype = value.dtype or ir.DataType.FLOAT
            if name in made:
                weight = PlacedWeight(name, "", made[name].shapes[name], False, offset, dtype, made[name])
                sources.update(made[name].sources)
            else:
                tensor = name.removesuffix(TRANSPOSED_SUFFIX)
                transposed = tensor != name
                weight = PlacedWeight(
                    name, tensor, _checkpoint_shape(value, transposed=transposed), transposed, offset, dtype
                )
                sources[tensor] = weight.shape
            weights.append(weight)
            offset += -(-weight.bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        plan = cls(tuple(weights), base, adapter)
        for source, shape in sources.items():
            _check_tensor(base, plan.stored_name(source), shape)
            plan.check_adapter_shapes(source, shape)
        _check_leftovers(base, set(base.entries) - set(map(plan.stored_name, sources)), tied=tied)
        if adapter is not None and (unknown := set(adapter.pairs) - set(sources)):
            raise CheckpointError(
                f"{adapter_directory}: adapts {min(unknown)} ({len(unknown)} such) | weights of this model | "
                "the adapter belongs to another model: check --adapter"
            )
        return plan

    def stored_name(self, source: str) -> str:
        """Return the name that a tensor has in the checkpoint; a tied table may be stored as lm_head."""
        return LM_HEAD if source == EMBEDDING_TABLE and source not in self.base.entries else source

    def check_adapter_shapes(self, source: str, shape: tuple[int, ...]) -> None:
        """Refuse LoRA factors that do not multiply to the tensor's shape."""
        lora = self._lora(source)
        if lora is None or self.adapter is None:
            return
        a, b = (self.adapter.index.entries[name].shape for name in (lora.a, lora.b))
        if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != shape or a[0] != b[1]:
            raise CheckpointError(
                f"{lora.file}: {lora.a} {list(a)} and {lora.b} {list(b)} | factors of "
                f"{source} {list(shape)} | the adapter belongs to another model: check --adapter"
            )

    def blocks(self, weight: PlacedWeight) -> Iterator[Tensor]:
        """Yield a weight that is copied as it is stored, (rows, ...) in its type, block by block.

        Raises:
            CheckpointError: a value is NaN or infinite, or the adapter does not change the weight.
            ExportError: a value is outside the range of the type.
        """
        for block in self.merged_blocks(weight.source, rows_at_once=_rows_at_once(weight)):
            narrow = block.to(_TORCH_TYPES[weight.dtype])
            if not torch.isfinite(narrow).all():
                raise ExportError(
                    f"{weight.source}: magnitude {float(block.abs().max()):.6g} | FP16 holds up to 65504 | "
                    f"--precision bf16, or --keep-float32 {weight.name.removesuffix(TRANSPOSED_SUFFIX)}"
                )
            yield narrow.T.contiguous() if weight.transposed else narrow

    def merged_blocks(self, source: str, *, rows_at_once: int | None = None) -> Iterator[Tensor]:
        """Yield a tensor of the checkpoint with the LoRA merged, FP32, some rows at a time.

        Args:
            source: its name.
            rows_at_once: None takes as many as ``BLOCK_ELEMENTS`` allows.

        Raises:
            CheckpointError: a value is NaN or infinite, or the adapter does not change the tensor.
        """
        stored = self.base.entries[self.stored_name(source)]
        lora, changed = self._lora(source), False
        factors = self._factors(lora)
        rows = rows_at_once or max(1, BLOCK_ELEMENTS // math.prod(stored.shape[1:]))
        for start in range(0, stored.shape[0], rows):
            block = self.base.read_rows(stored.name, slice(start, start + rows))
            if factors is not None:
                merged = block + factors[1][start : start + rows] @ factors[0]
                changed = changed or not torch.equal(merged, block)
                block = merged
            if not torch.isfinite(block).all():
                raise CheckpointError(
                    f"{stored.file}: {stored.name} holds NaN or infinity | finite weights | "
                    "the checkpoint or the adapter is damaged: download it again"
                )
            yield block
        if lora is not None and not changed:
            raise CheckpointError(
                f"{lora.file}: {lora.b} leaves {source} as it is | an adapter that changes every "
                "weight it names | the adapter is untrained or damaged: check --adapter"
            )

    def _lora(self, source: str) -> LoraPair | None:
        return self.adapter.pairs.get(source) if self.adapter is not None else None

    def _factors(self, lora: LoraPair | None) -> tuple[Tensor, Tensor] | None:
        """Return A and scaling * B in FP32."""
        if lora is None or self.adapter is None:
            return None
        index = self.adapter.index
        return index.read_rows(lora.a), index.read_rows(lora.b) * lora.scaling


def estimate_bytes(base: SafetensorsIndex) -> tuple[int, int]:
    """Return the FP32 bytes of all tensors together, and of the largest piece that is in memory at once."""
    elements = {name: math.prod(stored.shape) for name, stored in base.entries.items()}
    pieces = [min(n, BLOCK_ELEMENTS) if name in (EMBEDDING_TABLE, LM_HEAD) else n for name, n in elements.items()]
    return 4 * sum(elements.values()), 4 * max(pieces, default=0)


def write_weights(plan: WeightLayout, path: Path, *, on_bytes: Callable[[int], None]) -> FileEntry:
    """Write the data file.

    Args:
        plan: the matched weights.
        path: file to create.
        on_bytes: called with the number of bytes after each block.

    Returns:
        Size and SHA-256, taken while writing.
    """
    digest = hashlib.sha256()
    recipe: WeightSource | None = None
    made: Mapping[str, Tensor] = {}
    with path.open("wb") as file:
        for weight in plan.weights:
            padding = bytes(weight.offset - file.tell())
            file.write(padding)
            digest.update(padding)
            if weight.recipe is not None and weight.recipe is not recipe:  # its initializers follow one another
                recipe = weight.recipe
                made = recipe.tensors(plan.merged_blocks)
            for block in plan.blocks(weight) if weight.recipe is None else [made[weight.name]]:
                data = block.reshape(-1).view(torch.uint8).numpy().data  # no copy
                file.write(data)
                digest.update(data)
                on_bytes(len(data))
        return FileEntry(file.tell(), digest.hexdigest())


def external_tensors(plan: WeightLayout, location: str) -> dict[str, ir.ExternalTensor]:
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


def _rows_at_once(weight: PlacedWeight) -> int:
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
