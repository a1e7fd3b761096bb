"""What INT8 variants store in place of the checkpoint's weights: integers with their scales, and smoothed norms.

A :class:`WeightSource` reads tensors of the checkpoint, LoRA merged, and makes initializers of them. Tensors arrive in
blocks of rows, so that the vocabulary is never whole in FP32.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import onnx_ir as ir
import torch
from torch import Tensor

from gircse.calibration.int8.gptq import Moments, round_columns, round_smoothed
from gircse.calibration.int8.rounding import quantize_weight

Shape = tuple[int, ...]
ReadBlocks = Callable[[str], Iterator[Tensor]]
"""Yields a tensor of the checkpoint, LoRA merged, as FP32 blocks of rows."""

ReadMoments = Callable[[], Moments]
"""Reads the second moments of what a weight is multiplied with."""


class InitializerSpec(NamedTuple):
    """Element type and shape of an initializer."""

    dtype: ir.DataType
    shape: Shape


class WeightSource(Protocol):
    """Makes initializers from tensors of the checkpoint."""

    @property
    def reads(self) -> Mapping[str, Shape]:
        """Tensors of the checkpoint that it reads, with the shapes that they must have."""

    @property
    def initializers(self) -> Mapping[str, InitializerSpec]:
        """What it makes, by name."""

    def tensors(self, read: ReadBlocks) -> Mapping[str, Tensor]:
        """Return the values of the initializers."""


@dataclass(frozen=True)
class SmoothedNorm:
    """RMSNorm's weight divided by the smoothing of what reads its output.

    Attributes:
        name: the initializer, and the tensor of the checkpoint.
        smoothing: (hidden,) float32.
    """

    name: str
    smoothing: Tensor

    @property
    def reads(self) -> Mapping[str, Shape]:
        """The norm's weight (hidden,)."""
        return {self.name: tuple(self.smoothing.shape)}

    @property
    def initializers(self) -> Mapping[str, InitializerSpec]:
        """The norm's weight (hidden,), under the same name."""
        return {self.name: InitializerSpec(ir.DataType.FLOAT, tuple(self.smoothing.shape))}

    def tensors(self, read: ReadBlocks) -> Mapping[str, Tensor]:
        """Return weight / smoothing."""
        return {self.name: torch.cat(list(read(self.name))) / self.smoothing}


@dataclass(frozen=True)
class _Int8Weight:
    """Integers with their scales.

    Attributes:
        name: what the names of the initializers begin with.
    """

    name: str

    @property
    def weight_name(self) -> str:
        """Name of the integers."""
        return f"{self.name}.int8"

    @property
    def scale_name(self) -> str:
        """Name of their scales, float32."""
        return f"{self.name}.scale"


@dataclass(frozen=True)
class IntegerProduct(_Int8Weight):
    """The weights of one integer product (in, out), the projections of one input side by side.

    Attributes:
        reads: projections (out, in), in order.
        smoothing: (in,) float32, s, which the columns are multiplied with; None for none.
        outlier_channels: columns that stay in float.
        moments: reads the blocks of H that the rounding sees; None rounds to nearest.
    """

    reads: Mapping[str, Shape]
    smoothing: Tensor | None = None
    outlier_channels: tuple[int, ...] = ()
    moments: ReadMoments | None = None

    @property
    def outlier_name(self) -> str:
        """Name of the rows (n, out) float32 of the outlier channels."""
        return f"{self.name}.float"

    @property
    def outputs(self) -> int:
        """Columns of the product."""
        return sum(shape[0] for shape in self.reads.values())

    @property
    def initializers(self) -> Mapping[str, InitializerSpec]:
        """Integers (in, out), scales (out,), and the rows (n, out) of outlier channels where there are any."""
        inputs = next(iter(self.reads.values()))[1]
        made = {
            self.weight_name: InitializerSpec(ir.DataType.INT8, (inputs, self.outputs)),
            self.scale_name: InitializerSpec(ir.DataType.FLOAT, (self.outputs,)),
        }
        if self.outlier_channels:
            shape = (len(self.outlier_channels), self.outputs)
            made[self.outlier_name] = InitializerSpec(ir.DataType.FLOAT, shape)
        return made

    def tensors(self, read: ReadBlocks) -> Mapping[str, Tensor]:
        """Smooth and round: to nearest block by block, or the whole weight by its moments, which takes time."""
        moments = self.moments() if self.moments else None
        parts = []
        for name in self.reads:
            for block in read(name) if moments is None else [torch.cat(list(read(name)))]:
                parts.append(round_smoothed(block, self.smoothing, self.outlier_channels, moments))
        made = {
            self.weight_name: torch.cat([part.integers for part in parts]).T.contiguous(),
            self.scale_name: torch.cat([part.scales for part in parts]),
        }
        if self.outlier_channels:
            made[self.outlier_name] = torch.cat([part.columns for part in parts]).T.contiguous()
        return made


@dataclass(frozen=True)
class _OneWeight(_Int8Weight):
    """One tensor of the checkpoint as int8.

    Attributes:
        tensor: its name in the checkpoint.
        shape: its shape there, (out, in) or (vocab, hidden).
    """

    tensor: str
    shape: Shape

    @property
    def reads(self) -> Mapping[str, Shape]:
        """The tensor of the checkpoint."""
        return {self.tensor: self.shape}


@dataclass(frozen=True)
class BlockwiseProduct(_OneWeight):
    """One weight (in, out) as int8 with a scale for every block of inputs of every output.

    Attributes:
        block: inputs that share a scale; divides ``in``.
        moments: reads the blocks of H that the rounding sees; None rounds to nearest.
    """

    block: int
    moments: ReadMoments | None = None

    @property
    def initializers(self) -> Mapping[str, InitializerSpec]:
        """Integers (in, out) and scales (in / block, out)."""
        outputs, inputs = self.shape
        return {
            self.weight_name: InitializerSpec(ir.DataType.INT8, (inputs, outputs)),
            self.scale_name: InitializerSpec(ir.DataType.FLOAT, (inputs // self.block, outputs)),
        }

    def tensors(self, read: ReadBlocks) -> Mapping[str, Tensor]:
        """Round with a scale for every block of inputs; the whole weight at once where moments guide it."""
        moments = self.moments() if self.moments else None
        integers, scales = [], []
        for rows in read(self.tensor) if moments is None else [torch.cat(list(read(self.tensor)))]:
            nearest, steps = quantize_weight(rows.reshape(-1, self.block))
            scales.append(steps.reshape(len(rows), -1))
            rounded = nearest.reshape(rows.shape) if moments is None else round_columns(rows, scales[-1], moments)[0]
            integers.append(rounded)
        return {
            self.weight_name: torch.cat(integers).T.contiguous(),
            self.scale_name: torch.cat(scales).T.contiguous(),
        }


@dataclass(frozen=True)
class QuantizedEmbedding(_OneWeight):
    """The embedding table as int8 rows that are looked up, each with its scale."""

    @property
    def initializers(self) -> Mapping[str, InitializerSpec]:
        """Rows (vocab, hidden) and scales (vocab,)."""
        return {
            self.weight_name: InitializerSpec(ir.DataType.INT8, self.shape),
            self.scale_name: InitializerSpec(ir.DataType.FLOAT, self.shape[:1]),
        }

    def tensors(self, read: ReadBlocks) -> Mapping[str, Tensor]:
        """Round every row on its own."""
        pairs = [quantize_weight(block) for block in read(self.tensor)]
        return {
            self.weight_name: torch.cat([integers for integers, _ in pairs]),
            self.scale_name: torch.cat([scales for _, scales in pairs]),
        }


def block_size(inputs: int) -> int:
    """Return how many inputs share a scale: 32 or 16, which ONNX Runtime has kernels for, or all of them."""
    return next((size for size in (32, 16) if inputs % size == 0), inputs)
