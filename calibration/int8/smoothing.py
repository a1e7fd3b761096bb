"""SmoothQuant with the migration strength searched per input (G. Xiao et al., arXiv 2211.10438).

For an input X (tokens, in) of products with weights W (out, in), per channel j::

    s_j = max|X_j|^a / max|W_j|^(1 - a),   X' = X / s,   W' = W * s

so X' W'^T = X W^T, and the outliers of X move into W. The strength a with the smallest error of the quantized product
on sampled rows wins; no smoothing is one of the candidates. The channels that are still the largest may be excluded
from quantization as outlier channels: their columns of W' are zero in the integer product, which clips them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gircse.calibration.int8.rounding import quantize_rows, quantize_weight, split_weight

Migrations = tuple[float | None, ...]
MIGRATIONS: Migrations = (None, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

WORTHWHILE = 0.1
"""Share of the product's squared error that outlier channels have to save to be worth their time."""

SAMPLED_OUTPUTS = 1024
"""Outputs of a product that its error is measured on. An error is a sum over outputs and sampled rows of much the same
size: this many give it to about 1 %, and all 37,888 of an MLP of 7B parameters cost 37 times as long."""

_TINY = 1e-20


@dataclass(frozen=True)
class Smoothing:
    """What the search found for one input.

    Attributes:
        migration: a, or None for no smoothing.
        scales: (in,) float32, s; activations are divided by it.
        outlier_channels: channels that are excluded from quantization, sorted.
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
    """Return the ``count`` channels with the largest maxima (in,), sorted; none if that is all of them."""
    if count >= len(channel_maxima):
        return ()
    return tuple(sorted(channel_maxima.topk(count).indices.tolist()))


def range_without(channel_maxima: Tensor, channels: tuple[int, ...]) -> float:
    """Return the largest of the maxima (in,) of all other channels."""
    rest = channel_maxima.clone()
    rest[list(channels)] = 0
    return float(rest.max())


def product_error(
    exact: Tensor,
    rows: Tensor,
    weight: Tensor,
    scales: Tensor,
    outlier_channels: tuple[int, ...],
    *,
    threshold: float,
    limbs: int,
) -> float:
    """Return the mean over rows of the squared relative error of rows @ weight^T in INT8.

    Args:
        exact: (n, out) float32, rows @ weight^T.
        rows: (n, in) float32.
        weight: (out, in) float32.
        scales: (in,) float32, s.
        outlier_channels: see ``split_weight``.
        threshold: of the activations.
        limbs: of the activations.
    """
    smoothed = rows / scales
    integer_weight, columns = split_weight(weight, scales, outlier_channels)
    integers, steps = quantize_weight(integer_weight)
    quantized = quantize_rows(smoothed, threshold=threshold, limbs=limbs)
    product = quantized @ (integers * steps[:, None]).T + smoothed[:, list(outlier_channels)] @ columns.T
    norms = exact.square().sum(1)
    seen = norms > 0
    return float(((product - exact).square().sum(1)[seen] / norms[seen]).mean()) if seen.any() else 0.0


def search_smoothing(
    rows: Tensor,
    weights: Sequence[Tensor],
    channel_maxima: Tensor,
    *,
    limbs: int,
    outlier_channels: int,
    migrations: Migrations,
) -> Smoothing:
    """Try migration strengths and keep the one with the smallest error of the quantized product.

    The error is measured on ``SAMPLED_OUTPUTS`` outputs. Outlier channels are excluded only where that reduces it by
    ``WORTHWHILE``, because the narrow FP32 products cost time.

    Args:
        rows: (n, in) float32, sampled inputs.
        weights: (out, in) float32, every projection of the input.
        channel_maxima: (in,) float32, over all calibration texts.
        limbs: of the activations.
        outlier_channels: how many channels may be excluded from quantization.
        migrations: strengths to try; None is no smoothing. Empty where scales cannot be folded.
    """
    weight = sampled_outputs(weights)
    exact = rows @ weight.T
    # vector_norm, because abs() would make a copy of weights that are hundreds of MiB
    weight_maxima = torch.stack([torch.linalg.vector_norm(one, torch.inf, dim=0) for one in weights]).amax(0)

    def best(count: int) -> Smoothing:
        found = []
        for migration in migrations or (None,):
            scales = torch.ones_like(channel_maxima)
            if migration is not None:
                scales = smoothing_scales(channel_maxima, weight_maxima, migration)
            channels = largest_channels(channel_maxima / scales, count)
            threshold = range_without(channel_maxima / scales, channels)
            error = product_error(exact, rows, weight, scales, channels, threshold=threshold, limbs=limbs)
            found.append(Smoothing(migration, scales, channels, error))
        return min(found, key=lambda smoothing: smoothing.error)

    without = best(0)
    excluding = best(outlier_channels) if outlier_channels else without
    return excluding if excluding.error < (1 - WORTHWHILE) * without.error else without


def sampled_outputs(weights: Sequence[Tensor]) -> Tensor:
    """Return ``output_sample`` of the rows of weights (out, in) that read one input, all together."""
    sizes = [len(weight) for weight in weights]
    rows, first, chosen = output_sample(sum(sizes)), 0, []
    for weight, size in zip(weights, sizes, strict=True):
        chosen.append(weight[rows[(rows >= first) & (rows < first + size)] - first])
        first += size
    return torch.cat(chosen)


def output_sample(outputs: int) -> Tensor:
    """Return the numbers (n,) int64 of at most ``SAMPLED_OUTPUTS`` outputs, evenly spaced."""
    return torch.linspace(0, outputs - 1, min(outputs, SAMPLED_OUTPUTS), dtype=torch.float64).round().long()
