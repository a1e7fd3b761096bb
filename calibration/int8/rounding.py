"""Rounding to symmetric INT8: activations in one or two limbs, weights with one scale per output channel."""

import torch
from torch import Tensor

from gircse.calibration.int8.scheme import INT8_MAX, LO_LIMB


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


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to symmetric INT8 with one scale per output channel.

    Args:
        weight: (out, in) float32.

    Returns:
        Integers (out, in) int8 in -127..127, and scales (out,) float32; a row of zeros has scale 1.
    """
    scales = weight_scales(weight)
    return (weight / scales[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scales


def weight_scales(weight: Tensor) -> Tensor:
    """Return the scale (out,) float32 of each output channel of a weight (out, in); 1 for a row of zeros."""
    scales = torch.linalg.vector_norm(weight, torch.inf, dim=1) / INT8_MAX  # without a copy, as abs() makes one
    return torch.where(scales > 0, scales, torch.ones_like(scales))


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
