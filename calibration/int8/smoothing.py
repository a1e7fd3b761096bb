"""SmoothQuant with the migration strength searched per input (G. Xiao et al., arXiv 2211.10438).

For an input X (tokens, in) of products with weights W (out, in), per channel j::

    s_j = max|X_j|^a / max|W_j|^(1 - a),   X' = X / s,   W' = W * s

so X' W'^T = X W^T, and the outliers of X move into W. The strength a that leaves the smallest error of the quantized
product on sampled rows wins, "not at all" among them. The channels that are still the largest may stay in float: their
columns of W' are zero in the integer product, where they are clipped.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

Migrations = tuple[float | None, ...]
MIGRATIONS: Migrations = (None, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
INT8_MAX = 127.0
LO_LIMB = 254.0
"""Steps of the second digit in one of the first: a remainder of at most a half becomes at most 127."""
WORTHWHILE = 0.1
"""Share of the product's squared error that float channels have to save."""

_TINY = 1e-20


@dataclass(frozen=True)
class Smoothing:
    """What the search found for one input.

    Attributes:
        migration: a, or None for no smoothing.
        scales: (in,) float32, s; activations are divided by it.
        outlier_channels: channels that stay in float, sorted.
        error: mean over tokens of the squared relative error of the product.
    """

    migration: float | None
    scales: Tensor
    outlier_channels: tuple[int, ...]
    error: float


def smoothing_scales(channel_maxima: Tensor, weight_maxima: Tensor, migration: float) -> Tensor:
    """Return s (in,) float32, normalized to a geometric mean of 1 so that magnitudes stay where they were.

    Args:
        channel_maxima: (in,) float32, largest magnitude of each channel of X.
        weight_maxima: (in,) float32, largest magnitude of each column of W.
        migration: a, 0 to 1.
    """
    floor_x, floor_w = (max(float(maxima.max()) * 1e-6, _TINY) for maxima in (channel_maxima, weight_maxima))
    logs = (
        migration * channel_maxima.clamp(min=floor_x).log() - (1 - migration) * weight_maxima.clamp(min=floor_w).log()
    )
    return (logs - logs.mean()).exp()


def largest_channels(channel_maxima: Tensor, count: int) -> tuple[int, ...]:
    """Return the ``count`` channels with the largest maxima (in,), sorted; none if that were all of them."""
    if count >= len(channel_maxima):
        return ()
    return tuple(sorted(channel_maxima.topk(count).indices.tolist()))


def range_without(channel_maxima: Tensor, channels: tuple[int, ...]) -> float:
    """Return the largest of the maxima (in,) of all other channels."""
    rest = channel_maxima.clone()
    rest[list(channels)] = 0
    return float(rest.max())


def quantize_rows(values: Tensor, *, threshold: float, limbs: int) -> Tensor:
    """Round activations (..., in) to symmetric int8 and back.

    Args:
        values: float32.
        threshold: largest magnitude that is not clipped; 0 for an input that is always 0.
        limbs: 1, or 2 for a second digit that holds the remainder.
    """
    step = (threshold or INT8_MAX) / INT8_MAX
    hi = (values / step).round().clamp(-INT8_MAX, INT8_MAX)
    if limbs == 1:
        return hi * step
    lo = ((values / step - hi) * LO_LIMB).round().clamp(-INT8_MAX, INT8_MAX)
    return (hi + lo / LO_LIMB) * step


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight (out, in) to symmetric int8 with one scale for each output channel.

    Returns:
        Integers (out, in) int8 in -127..127, and scales (out,) float32; a row of zeros has scale 1.
    """
    scales = weight.abs().amax(1) / INT8_MAX
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (weight / scales[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scales


def split_weight(weight: Tensor, scales: Tensor, outlier_channels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the weight that the integer product reads and the columns of the float channels.

    Args:
        weight: (out, in) float32.
        scales: (in,) float32, s.
        outlier_channels: columns that stay in float.

    Returns:
        W' (out, in) with those columns zero, and the columns (out, n) float32.
    """
    smoothed = weight * scales
    channels = list(outlier_channels)
    columns = smoothed[:, channels].clone()
    smoothed[:, channels] = 0
    return smoothed, columns


def product_error(
    rows: Tensor, weight: Tensor, scales: Tensor, outlier_channels: tuple[int, ...], *, threshold: float, limbs: int
) -> float:
    """Mean over rows of the squared relative error that int8 leaves in rows @ weight^T.

    Args:
        rows: (n, in) float32.
        weight: (out, in) float32.
        scales: (in,) float32, s.
        outlier_channels: see ``split_weight``.
        threshold: of the activations.
        limbs: of the activations.
    """
    smoothed = rows / scales
    integer_weight, columns = split_weight(weight, scales, outlier_channels)
    integers, weight_scales = quantize_weight(integer_weight)
    quantized = quantize_rows(smoothed, threshold=threshold, limbs=limbs)
    product = quantized @ (integers * weight_scales[:, None]).T + smoothed[:, list(outlier_channels)] @ columns.T
    exact = rows @ weight.T
    norms = exact.square().sum(1)
    seen = norms > 0
    return float(((product - exact).square().sum(1)[seen] / norms[seen]).mean()) if seen.any() else 0.0


def search_smoothing(
    rows: Tensor, weight: Tensor, channel_maxima: Tensor, *, limbs: int, outlier_channels: int, migrations: Migrations
) -> Smoothing:
    """Try migration strengths and keep the one with the smallest error of the quantized product.

    Channels stay in float only where that makes the error smaller by ``WORTHWHILE``, because the narrow products beside
    the integer one cost time.

    Args:
        rows: (n, in) float32, sampled inputs.
        weight: (out, in) float32, all projections of the input.
        channel_maxima: (in,) float32, over all calibration texts.
        limbs: of the activations.
        outlier_channels: how many channels may stay in float.
        migrations: strengths to try; None is no smoothing. Empty where no scales can be folded.
    """
    weight_maxima = weight.abs().amax(0)

    def best(count: int) -> Smoothing:
        found = []
        for migration in migrations or (None,):
            scales = torch.ones_like(channel_maxima)
            if migration is not None:
                scales = smoothing_scales(channel_maxima, weight_maxima, migration)
            channels = largest_channels(channel_maxima / scales, count)
            threshold = range_without(channel_maxima / scales, channels)
            error = product_error(rows, weight, scales, channels, threshold=threshold, limbs=limbs)
            found.append(Smoothing(migration, scales, channels, error))
        return min(found, key=lambda smoothing: smoothing.error)

    without = best(0)
    beside = best(outlier_channels) if outlier_channels else without
    return beside if beside.error < (1 - WORTHWHILE) * without.error else without
