"""Symmetric rounding: activations to INT8 in one or two limbs, weights to a grid of 8 or 4 bits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gircse.calibration.int8.scheme import INT8_MAX, LO_LIMB


@dataclass(frozen=True)
class WeightGrid:
    """The numbers that a weight is rounded to: symmetric integers, times a scale per output channel or finer.

    Attributes:
        bits: of an integer, 8 or 4; the most negative one is not used.
        block: neighboring inputs that share a scale; None for all of an output channel.
    """

    bits: int = 8
    block: int | None = None

    @property
    def largest(self) -> float:
        """The largest number."""
        return float(2 ** (self.bits - 1) - 1)

    @property
    def dtype(self) -> torch.dtype:
        """What holds the numbers, those of 4 bits too."""
        return torch.int8

    def round(self, levels: Tensor) -> Tensor:
        """Round to the nearest number, in place; larger ones become the largest."""
        return levels.round_().clamp_(-self.largest, self.largest)

    def scales(self, magnitudes: Tensor) -> Tensor:
        """Return the scales, float32, with which the grid holds numbers up to some magnitudes; 1 for 0."""
        return torch.where(magnitudes > 0, magnitudes / self.largest, torch.ones_like(magnitudes))


INT8_PER_CHANNEL = WeightGrid()

SHRINKS = tuple(1 - 0.04 * number for number in range(13))
"""What the scale of a block may be multiplied by, from 1, with which it holds its largest weight, to 0.52."""

_ROWS = 1024
"""Outputs whose scales are searched at once, to save memory."""


def quantize_rows(values: Tensor, *, threshold: float, limbs: int) -> Tensor:
    """Round activations to symmetric INT8 and back.

    Args:
        values: (..., in) float32.
        threshold: largest magnitude that is not clipped; 0 for an input that is always 0.
        limbs: 1, or 2 for a lo limb that holds the remainder.
    """
    step = (threshold or INT8_MAX) / INT8_MAX
    hi = (values / step).round().clamp(-INT8_MAX, INT8_MAX)
    if limbs == 1:
        return hi * step
    lo = ((values / step - hi) * LO_LIMB).round().clamp(-INT8_MAX, INT8_MAX)
    return (hi + lo / LO_LIMB) * step


def quantize_weight(weight: Tensor, grid: WeightGrid = INT8_PER_CHANNEL) -> tuple[Tensor, Tensor]:
    """Round a weight to the nearest numbers of a grid.

    Args:
        weight: (out, in) float32.
        grid: its ``block``, if any, divides ``in``.

    Returns:
        Numbers of the grid (out, in) in its type, and their scales, see ``weight_scales``.
    """
    scales = weight_scales(weight, grid)
    blocks = weight.reshape(len(weight), -1, grid.block or weight.shape[1])
    levels = grid.round(blocks / scales.reshape(len(weight), -1, 1))
    return levels.to(grid.dtype).reshape(weight.shape), scales


def weight_scales(weight: Tensor, grid: WeightGrid = INT8_PER_CHANNEL) -> Tensor:
    """Return the scales with which a grid holds all of a weight.

    Args:
        weight: (out, in) float32.
        grid: its ``block``, if any, divides ``in``.

    Returns:
        (out,) float32 without blocks, else (out, in / block); 1 where all weights are 0.
    """
    blocks = weight if grid.block is None else weight.reshape(len(weight), -1, grid.block)
    return grid.scales(torch.linalg.vector_norm(blocks, torch.inf, dim=-1))  # without a copy, as abs() makes one


def least_error_scales(weight: Tensor, grid: WeightGrid, energy: Tensor) -> Tensor:
    """Return the scales with the least squared error of the nearest numbers, some of which are clipped.

    Args:
        weight: (out, in) float32.
        grid: with blocks that divide ``in``.
        energy: (in,) float32, what the squared error of an input is multiplied by.

    Returns:
        (out, in / block) float32.
    """
    return torch.cat([_least_error_scales(rows, grid, energy) for rows in weight.split(_ROWS)])


def _least_error_scales(weight: Tensor, grid: WeightGrid, energy: Tensor) -> Tensor:
    widest = weight_scales(weight, grid)
    blocks, energy = weight.reshape(*widest.shape, -1), energy.reshape(1, widest.shape[1], -1)
    best, least = widest, torch.full_like(widest, torch.inf)
    for shrink in SHRINKS:
        scales = shrink * widest
        levels = grid.round(blocks / scales[..., None])
        error = levels.mul_(scales[..., None]).sub_(blocks).square_().mul_(energy).sum(-1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def split_weight(weight: Tensor, scales: Tensor, outlier_channels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Smooth a weight and take the columns of the outlier channels out of it.

    Args:
        weight: (out, in) float32.
        scales: (in,) float32, s of SmoothQuant.
        outlier_channels: columns that are excluded from quantization.

    Returns:
        W * s (out, in) with those columns zero, for the integer product, and the columns (out, n), both float32.
    """
    smoothed = weight * scales
    channels = list(outlier_channels)
    columns = smoothed[:, channels].clone()
    smoothed[:, channels] = 0
    return smoothed, columns
