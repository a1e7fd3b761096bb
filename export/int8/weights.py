"""Weights that INT8 variants store in place of the checkpoint's: integers with their scales, and smoothed norms.

A recipe names the tensors of the checkpoint that it reads and turns them, LoRA merged, into initializers. Tensors
arrive in blocks of rows, so that the vocabulary is never whole in FP32.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gircse.calibration.int8.gptq import Moments, round_columns, round_smoothed
from gircse.calibration.int8.rounding import quantize_weight

Shape = tuple[int, ...]
ReadBlocks = Callable[[str], Iterator[Tensor]]
"""Yields a tensor of the checkpoint, LoRA merged, as FP32 blocks of rows."""


ReadMoments = Callable[[], Moments]
"""Reads the second moments of what a weight is multiplied with."""


class WeightSource(Protocol):
    """How some initializers are made."""

    @property
    def sources(self) -> Mapping[str, Shape]:
        """Tensors of the checkpoint with the shapes they must have."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The initializers that are made, with their shapes."""

    def tensors(self, read: ReadBlocks) -> Mapping[str, Tensor]:
        """Make the initializers."""


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
    def sources(self) -> Mapping[str, Shape]:
        """The one tensor."""
        return {self.name: tuple(self.smoothing.shape)}

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The one initializer."""
        return self.sources

    def tensors(self, read: ReadBlocks) -> Mapping[str, Tensor]:
        """Divide."""
        return {self.name: torch.cat(list(read(self.name))) / self.smoothing}


@dataclass(frozen=True)
class IntegerProduct:
    """The weights of one integer product (in, out), the projections of one input side by side.

    Attributes:
        name: of the product; the initializers are ``weight_name``, ``scale_name`` and ``outlier_name``.
        sources: projections (out, in), in order.
        smoothing: (in,) float32, s, which the columns are multiplied with; None for none.
        outlier_channels: columns that stay in float.
        moments: reads the blocks of H that the rounding sees; None rounds to nearest.
    """

    name: str
    sources: Mapping[str, Shape]
    smoothing: Tensor | None = None
    outlier_channels: tuple[int, ...] = ()
    moments: ReadMoments | None = None

    @property
    def weight_name(self) -> str:
        """(in, out) int8."""
        return f"{self.name}.int8"

    @property
    def scale_name(self) -> str:
        """(out,) float32."""
        return f"{self.name}.scale"

    @property
    def outlier_name(self) -> str:
        """(n, out) float32, rows of the float channels."""
        return f"{self.name}.float"

    @property
    def outputs(self) -> int:
        """Columns of the product."""
        return sum(shape[0] for shape in self.sources.values())

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Weight, scale, and where channels stay in float, their rows."""
        inputs = next(iter(self.sources.values()))[1]
        floats = {self.outlier_name: (len(self.outlier_channels), self.outputs)} if self.outlier_channels else {}
        return {self.weight_name: (inputs, self.outputs), self.scale_name: (self.outputs,), **floats}

    def tensors(self, read: ReadBlocks) -> Mapping[str, Tensor]:
        """Smooth and round: row block by row block to nearest, and whole where the inputs are seen, which takes time."""
        moments = self.moments() if self.moments else None
        parts = []
        for source in self.sources:
            for block in read(source) if moments is None else [torch.cat(list(read(source)))]:
                parts.append(round_smoothed(block, self.smoothing, self.outlier_channels, moments))
        made = {
            self.weight_name: torch.cat([part.integers for part in parts]).T.contiguous(),
            self.scale_name: torch.cat([part.scales for part in parts]),
        }
        if self.outlier_channels:
            made[self.outlier_name] = torch.cat([part.columns for part in parts]).T.contiguous()
        return made


@dataclass(frozen=True)
class _OneWeight:
    """One tensor of the checkpoint as int8.

    Attributes:
        name: prefix of the initializers ``weight_name`` and ``scale_name``.
        source: tensor of the checkpoint.
        shape: its shape there, (out, in) or (vocab, hidden).
    """

    name: str
    source: str
    shape: Shape

    @property
    def weight_name(self) -> str:
        """int8."""
        return f"{self.name}.int8"

    @property
    def scale_name(self) -> str:
        """float32."""
        return f"{self.name}.scale"

    @property
    def sources(self) -> Mapping[str, Shape]:
        """The one tensor."""
        return {self.source: self.shape}


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
    def shapes(self) -> Mapping[str, Shape]:
        """Weight (in, out) and scales (in / block, out)."""
        outputs, inputs = self.shape
        return {self.weight_name: (inputs, outputs), self.scale_name: (inputs // self.block, outputs)}

    def tensors(self, read: ReadBlocks) -> Mapping[str, Tensor]:
        """Round with a scale for every block of inputs; whole where the inputs are seen."""
        moments = self.moments() if self.moments else None
        integers, scales = [], []
        for rows in read(self.source) if moments is None else [torch.cat(list(read(self.source)))]:
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
    def shapes(self) -> Mapping[str, Shape]:
        """Rows (vocab, hidden) and scales (vocab,)."""
        return {self.weight_name: self.shape, self.scale_name: self.shape[:1]}

    def tensors(self, read: ReadBlocks) -> Mapping[str, Tensor]:
        """Round every row on its own."""
        pairs = [quantize_weight(block) for block in read(self.source)]
        return {
            self.weight_name: torch.cat([integers for integers, _ in pairs]),
            self.scale_name: torch.cat([scales for _, scales in pairs]),
        }


def block_size(inputs: int) -> int:
    """Return how many inputs share a scale: 32 or 16, which ONNX Runtime has kernels for, or all of them."""
    return next((size for size in (32, 16) if inputs % size == 0), inputs)
