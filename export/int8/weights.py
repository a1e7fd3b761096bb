"""What quantized variants store in place of the checkpoint's weights: integers, their scales, and smoothed norms.

A :class:`WeightSource` reads tensors of the checkpoint, LoRA merged, and makes initializers of them. Tensors arrive in
blocks of rows, so that the vocabulary is never whole in FP32.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import onnx_ir as ir
import torch
from torch import Tensor

from gircse.calibration.int8.gptq import Moments, round_smoothed
from gircse.calibration.int8.rounding import INT8_PER_CHANNEL, WeightGrid, quantize_weight

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
class QuantizedProduct:
    """The weights of one product (in, out) as integers with scales, the projections of one input side by side.

    Attributes:
        name: what the names of the initializers begin with.
        reads: projections (out, in), in order.
        smoothing: (in,) float32, s, which the columns are multiplied with; None for none.
        outlier_channels: columns that stay in float.
        moments: reads the blocks of H that the rounding sees; None rounds to nearest.
        grid: what the weights are rounded to.
    """

    name: str
    reads: Mapping[str, Shape]
    smoothing: Tensor | None = None
    outlier_channels: tuple[int, ...] = ()
    moments: ReadMoments | None = None
    grid: WeightGrid = INT8_PER_CHANNEL

    @property
    def weight_name(self) -> str:
        """Name of the integers."""
        return f"{self.name}.int{self.grid.bits}"

    @property
    def scale_name(self) -> str:
        """Name of their scales, float32."""
        return f"{self.name}.scale"

    @property
    def outlier_name(self) -> str:
        """Name of the rows (n, out) float32 of the outlier channels."""
        return f"{self.name}.float"

    @property
    def initializers(self) -> Mapping[str, InitializerSpec]:
        """Integers (in, out), scales (out,) or (in / block, out), and the rows (n, out) of outlier channels, if any."""
        inputs, outputs = next(iter(self.reads.values()))[1], sum(shape[0] for shape in self.reads.values())
        block = self.grid.block
        integer = ir.DataType.INT8 if self.grid.bits == 8 else ir.DataType.INT4
        scales = (outputs,) if block is None else (inputs // block, outputs)
        made = {
            self.weight_name: InitializerSpec(integer, (inputs, outputs)),
            self.scale_name: InitializerSpec(ir.DataType.FLOAT, scales),
        }
        if self.outlier_channels:
            rows = (len(self.outlier_channels), outputs)
            made[self.outlier_name] = InitializerSpec(ir.DataType.FLOAT, rows)
        return made

    def tensors(self, read: ReadBlocks) -> Mapping[str, Tensor]:
        """Smooth and round: to nearest block by block, or the whole weight by its moments, which takes time.

        Returns:
            The values; those of an INT4 initializer as int8.
        """
        moments = self.moments() if self.moments else None
        parts = []
        for name in self.reads:
            for rows in read(name) if moments is None else [torch.cat(list(read(name)))]:
                parts.append(round_smoothed(rows, self.smoothing, self.outlier_channels, moments, grid=self.grid))
        made = {
            self.weight_name: torch.cat([part.integers for part in parts]).T.contiguous(),
            self.scale_name: torch.cat([part.scales for part in parts]).movedim(0, -1).contiguous(),
        }
        if self.outlier_channels:
            made[self.outlier_name] = torch.cat([part.columns for part in parts]).T.contiguous()
        return made


@dataclass(frozen=True)
class QuantizedEmbedding:
    """The embedding table as int8 rows that are looked up, each with its scale.

    Attributes:
        name: what the names of the initializers begin with.
        tensor: its name in the checkpoint.
        shape: (vocab, hidden).
    """

    name: str
    tensor: str
    shape: Shape

    @property
    def reads(self) -> Mapping[str, Shape]:
        """The tensor of the checkpoint."""
        return {self.tensor: self.shape}

    @property
    def weight_name(self) -> str:
        """Name of the integers."""
        return f"{self.name}.int8"

    @property
    def scale_name(self) -> str:
        """Name of their scales, float32."""
        return f"{self.name}.scale"

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
