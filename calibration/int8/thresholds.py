"""Thresholds of symmetric INT8 from a histogram of magnitudes: where to clip. Pure functions.

A threshold t, 0 <= t <= the maximum, sets scale = t / 127 and x becomes scale * clip(round(x / scale), -127, 127):
magnitudes above t are clipped to it, those below are rounded by half a scale at most. The four methods weigh these two
errors against each other:

- max: t is the maximum, nothing is clipped.
- percentile: t is a percentile of the magnitudes.
- entropy: t has the least Kullback-Leibler divergence between the clipped histogram and its version in 128 levels.
- mse: t has the least expected squared error.

A histogram of zeros only has threshold 0 in all of them, which gives no scale: the caller decides.
"""

from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gircse.calibration.int8.histogram import Counts, MagnitudeHistogram
from gircse.calibration.int8.scheme import INT8_MAX
from gircse.runtime.errors import OptionError
from gircse.runtime.numerics import Float64

ENTROPY_LEVELS = 128
"""Levels of magnitude in the entropy method, as NVIDIA counts them."""

PERCENTILE = 99.99
"""In percent of the magnitudes, zeros included: the default of NVIDIA's calibrators."""

MSE_STEPS_PER_OCTAVE = 32
"""Candidates of the MSE method between a threshold and its double, 2.2 % apart; the best of them is refined."""

MSE_FINE_STEPS = 16
"""Candidates of the refinement on either side of the best, up to its neighbors: 0.14 % apart."""

MSE_OCTAVES = 10
"""How far the MSE method searches below the maximum: down to maximum / 1024, about one bin."""

TIED_DIVERGENCE = 1e-9
"""Divergences, in nats, that are no further apart count as equal: far above their rounding error (1e-13), far below
what a histogram of a finite sample can resolve."""


class Method(StrEnum):
    """How a threshold is found."""

    MAX = "max"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MSE = "mse"


def threshold(histogram: MagnitudeHistogram, method: Method) -> float:
    """Return the threshold by a method, with its default settings."""
    methods = {
        Method.MAX: max_threshold,
        Method.PERCENTILE: percentile_threshold,
        Method.ENTROPY: entropy_threshold,
        Method.MSE: mse_threshold,
    }
    return methods[method](histogram)


def max_threshold(histogram: MagnitudeHistogram) -> float:
    """Return the exact maximum."""
    return histogram.maximum


def percentile_threshold(histogram: MagnitudeHistogram, percentile: float = PERCENTILE) -> float:
    """Return the magnitude that ``percentile`` percent of all magnitudes do not exceed.

    With N values, of which C(x) lie below x, t solves C(t) = N * percentile / 100. Within a bin C is taken as linear,
    that is, values as uniform within the bin (in the last one, up to the maximum), so t grows with the percentile and
    is off by less than a bin. NVIDIA's and ONNX Runtime's calibrators return the lower edge of that bin instead, which
    clips the whole bin, and which is 0 where most values are in the first.

    Args:
        histogram: magnitudes.
        percentile: above 0, at most 100, which gives the maximum.

    Raises:
        OptionError: the percentile is out of range.
    """
    if not 0 < percentile <= 100:
        raise OptionError("percentile", f"is {percentile}", "it can be above 0, up to 100")
    if histogram.maximum == 0:
        return 0.0
    cumulated = histogram.counts.cumsum()
    rank = histogram.total * percentile / 100
    at = int(np.searchsorted(cumulated, rank))  # the first bin up to which there are as many; it is not empty
    share = 1 - (int(cumulated[at]) - rank) / int(histogram.counts[at])
    lower, upper = at * histogram.width, min((at + 1) * histogram.width, histogram.maximum)
    return min(lower + (upper - lower) * share, histogram.maximum)


def entropy_threshold(histogram: MagnitudeHistogram) -> float:
    """Return the edge above which clipping has the least divergence, or the maximum if that is smaller.

    The edge is the upper one of a bin; of several equal ones, the one that clips least wins. Candidates start at 128
    bins, one per level, so t is never less than a 16th of the maximum, however extreme the outliers are.
    """
    if histogram.maximum == 0:
        return 0.0
    divergences = entropy_divergences(np.trim_zeros(histogram.counts, "b"))
    last = int(np.flatnonzero(divergences <= divergences.min() + TIED_DIVERGENCE)[-1])
    return min((ENTROPY_LEVELS + last) * histogram.width, histogram.maximum)


def entropy_divergences(counts: Counts) -> Float64:
    """Return the Kullback-Leibler divergence between a histogram clipped after i bins and its quantized version.

    It is computed for every i, after S. Migacz, "8-bit inference with TensorRT" (GTC 2017, S7310), slide "Entropy
    calibration - pseudocode"; levels of a fractional number of bins as in NVIDIA's pytorch-quantization,
    ``calib/histogram.py``. For bins c_0, c_1, ... and their sum N:

    - P is c_0 .. c_{i-1} with the T clipped values added to its last bin, divided by N.
    - Q is the same without the clipped values, in 128 equal levels: bin b is in level floor(128 b / i), and the sum S_l
      of a level is spread evenly over those n_l of its bins that are not empty. Divided by the sum of all, C.
    - D(i) = sum_b P_b ln(P_b / Q_b), infinite where values were clipped to an empty bin.

    As ln Q is constant on a level, N D(i) = sum_b N P_b ln(N P_b) - sum_l S_l ln(S_l / n_l) - T ln(S / n of the last
    level) - N ln(N / C): sums up to b and differences of sums, and no loop over i. Unlike pytorch-quantization, the
    first bin is not replaced by the second: it holds half of all values and more where a tensor has outliers.

    Args:
        counts: (n,) int64, n >= 128, the last one not 0.

    Returns:
        (n - 127,) float64, in nats: D(128) .. D(n).
    """
    kept = np.arange(ENTROPY_LEVELS, counts.size + 1)  # i
    starts = -(-np.arange(ENTROPY_LEVELS + 1) * kept[:, None] // ENTROPY_LEVELS)  # of levels: (n - 127, 129) bins
    values = _sums_before(counts)
    sums, bins = np.diff(values[starts]), np.diff(_sums_before(counts > 0)[starts])  # S_l, n_l
    log_q = np.log(np.maximum(sums, 1) / np.maximum(bins, 1))  # 0 for empty levels, where P is 0
    clipped, last = counts.sum() - values[kept], counts[kept - 1]
    entropy_p = _sums_before(_x_log_x(counts))[kept - 1] + _x_log_x(last + clipped)
    cross = (sums * log_q).sum(axis=1) + clipped * log_q[:, -1]
    divergences: Float64 = (entropy_p - cross) / counts.sum() - np.log(counts.sum() / values[kept].clip(1))
    divergences[(clipped > 0) & (last == 0)] = np.inf
    return divergences


def mse_threshold(histogram: MagnitudeHistogram) -> float:
    """Return the threshold with the least expected squared error, searched on a coarse, then on a fine geometric grid.

    It is less than the maximum even for uniform values: with t = 127 / 127.5 of it, the largest are rounded to level
    127 from both sides, and the scale is a little smaller.
    """
    if histogram.maximum == 0:
        return 0.0
    step = 1 / MSE_STEPS_PER_OCTAVE
    coarse = _least_error(histogram, histogram.maximum * np.exp2(-np.arange(0, MSE_OCTAVES + step, step)))
    around = coarse * np.exp2(step * np.linspace(1, -1, 2 * MSE_FINE_STEPS + 1))
    return _least_error(histogram, np.minimum(around, histogram.maximum))


def squared_errors(counts: Counts, thresholds: Float64, *, width: float) -> Float64:
    """Return the expected squared error of rounding and clipping to symmetric INT8.

    Values are taken as uniform within a bin. Its error is then the integral of the squared error over the bin,
    which has a closed form: with scale s = t / 127 and the nearest level k = min(round(x / s), 127),

        F(x) = integral from 0 to x of (u - s k(u))^2 du = k s^3 / 12 + (x - s k)^3 / 3,

    as each cell of width s contributes s^3 / 12. NVIDIA's pytorch-quantization takes the error at the center of a bin,
    which is good only where bins are much narrower than s: where s is one bin wide, all centers lie halfway between two
    levels and the error comes out three times too large; where it is two, a quarter too small.

    Args:
        counts: (n,) int64, not all 0.
        thresholds: (m,) float64, above 0.
        width: of a bin.

    Returns:
        (m,) float64, mean over all values, in the square of their unit.
    """
    scale = thresholds[:, None] / INT8_MAX
    edges = np.arange(counts.size + 1) * width
    level = np.minimum(np.rint(edges / scale), INT8_MAX)  # (m, n + 1)
    integral = level * scale**3 / 12 + (edges - level * scale) ** 3 / 3
    errors: Float64 = (np.diff(integral) * counts).sum(axis=1) / (width * counts.sum())
    return errors


def _least_error(histogram: MagnitudeHistogram, candidates: Float64) -> float:
    """Return the candidate with the least expected squared error; the first of equals."""
    errors = squared_errors(np.trim_zeros(histogram.counts, "b"), candidates, width=histogram.width)
    return float(candidates[errors.argmin()])


def _sums_before(values: NDArray[Any]) -> Float64:
    """Return the sums of the first 0, 1, ..., n values: (n + 1,) float64, exact for counts below 2 ** 53."""
    sums: Float64 = np.concatenate([[0.0], values.cumsum()])
    return sums


def _x_log_x(counts: NDArray[Any]) -> Float64:
    """Return x ln x, and 0 for 0."""
    product: Float64 = counts * np.log(np.maximum(counts, 1))
    return product
