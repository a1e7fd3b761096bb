"""A histogram of magnitudes |x| in constant memory, independent of the order and the batching of the values.

The bins are BINS equal, half-open intervals over [0, limit), and limit is the smallest power of two above the largest
value. So value x lies in bin floor(|x| * BINS / limit), an exact product in floating point, and when a larger value
arrives, limit doubles and each pair of bins merges into one: floor(floor(y) / 2) = floor(y / 2). The counts are
therefore the same, bit for bit, as if the largest value had been known from the start, and at least half of the bins
lie below it. NVIDIA's and ONNX Runtime's collectors keep the bin width that the first batch happened to give.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gircse.runtime.errors import CheckpointError, OptionError, sentence
from gircse.runtime.numerics import Float32, Float64

Counts = NDArray[np.int64]
BINS = 2048
"""Number of bins, as in NVIDIA's calibrators. A power of two, so that bins merge in pairs and edges are exact."""

SMALLEST_LIMIT = math.ldexp(1, -149)
"""Limit while all values are zero: the smallest positive float32, so that any other value raises it."""

_CHUNK = 1 << 16
"""Values that are counted at a time, so that their float64 and int64 copies fit into the CPU's cache."""


@dataclass(eq=False, kw_only=True)
class MagnitudeHistogram:
    """The counts so far. Its fields are its whole state: saved and passed to the constructor, they give it back.

    Attributes:
        counts: (BINS,) int64, copied. Zeros are in the first bin.
        limit: upper edge of the last bin, in the unit of the values.
        maximum: largest magnitude, exact; 0 where all values are zero, or none has been added.

    Raises:
        OptionError: the fields are not those of one histogram.
    """

    counts: Counts = field(default_factory=lambda: np.zeros(BINS, np.int64))
    limit: float = SMALLEST_LIMIT
    maximum: float = 0.0

    def __post_init__(self) -> None:
        _check_fields(self.counts, self.limit, maximum=self.maximum)
        self.counts = self.counts.copy()

    @property
    def width(self) -> float:
        """Width of a bin."""
        return self.limit / BINS

    @property
    def edges(self) -> Float64:
        """Lower edge of each bin and the limit: (BINS + 1,) float64, exact."""
        return np.linspace(0, self.limit, BINS + 1)

    @property
    def total(self) -> int:
        """Number of values, zeros included."""
        return int(self.counts.sum())

    def add(self, values: Float32, *, where: str) -> None:
        """Count the magnitudes of an array.

        Args:
            values: float32 of any shape, also empty.
            where: name of the values, for errors.

        Raises:
            CheckpointError: a value is NaN or infinite; nothing has been counted.
            TypeError: the values are not float32.
        """
        if values.dtype != np.float32:
            raise TypeError(sentence(where, f"has {values.dtype} values", "float32 is needed"))
        if values.size == 0:
            return
        peak = max(float(values.max()), -float(values.min()))  # NaN if any value is
        if not math.isfinite(peak):
            raise CheckpointError(
                where,
                "has NaN or infinite values",
                None,
                "The checkpoint or the adapter is damaged: download it again.",
            )
        self._grow(peak)
        flat = values.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            self.counts += count_magnitudes(flat[start : start + _CHUNK], limit=self.limit)

    def merge(self, other: "MagnitudeHistogram") -> "MagnitudeHistogram":
        """Return the histogram of the values of both; neither changes."""
        union = MagnitudeHistogram(counts=self.counts, limit=self.limit, maximum=self.maximum)
        union._grow(other.maximum)
        union.counts += merge_bins(other.counts, doublings=_doublings(other.limit, union.limit))
        return union

    def _grow(self, peak: float) -> None:
        """Raise the limit for a magnitude that is about to be counted."""
        self.maximum = max(self.maximum, peak)
        limit = limit_above(self.maximum)
        self.counts = merge_bins(self.counts, doublings=_doublings(self.limit, limit))
        self.limit = limit


def limit_above(maximum: float) -> float:
    """Return the smallest power of two above a magnitude; not the magnitude itself, since bins are half-open."""
    return math.ldexp(1, math.frexp(maximum)[1]) if maximum else SMALLEST_LIMIT


def count_magnitudes(values: Float32, *, limit: float) -> Counts:
    """Count how many magnitudes lie in each of the equal bins over [0, limit).

    Args:
        values: (n,) float32, finite, magnitudes below the limit.
        limit: a power of two.

    Returns:
        (BINS,) int64.
    """
    # in float64, where no power of two that float32 values can have over- or underflows
    bins = np.multiply(np.abs(values), BINS / limit, dtype=np.float64).astype(np.intp)
    counts: Counts = np.bincount(bins, minlength=BINS)
    return counts


def merge_bins(counts: Counts, *, doublings: int) -> Counts:
    """Return the counts for a limit that is 2 ** doublings times as large.

    Args:
        counts: (BINS,) int64.
        doublings: 0 or more.

    Returns:
        (BINS,) int64, a new array with the same sum.
    """
    together = 1 << min(doublings, BINS.bit_length() - 1)
    merged = np.zeros(BINS, np.int64)
    merged[: BINS // together] = counts.reshape(-1, together).sum(axis=1)
    return merged


def _doublings(smaller: float, larger: float) -> int:
    """Return how often one power of two must double to be the other."""
    return math.frexp(larger)[1] - math.frexp(smaller)[1]


def _check_fields(counts: Counts, limit: float, *, maximum: float) -> None:
    """Refuse fields that are not those of one histogram."""
    advice = "Pass the three fields of one histogram."
    if counts.dtype != np.int64 or counts.shape != (BINS,) or (counts < 0).any():
        got = f"are {counts.dtype} {counts.shape}, the smallest {counts.min(initial=0)}"
        raise OptionError("counts", got, f"they should be int64 ({BINS},), none negative", advice)
    if not (math.isfinite(maximum) and maximum >= 0) or limit != limit_above(maximum):
        raise OptionError(
            "limit", f"is {limit} for a maximum of {maximum}", "it should be the next power of two", advice
        )
    last = int(np.flatnonzero(counts).max(initial=0))
    if last != int(maximum * (BINS / limit)):
        raise OptionError("maximum", f"is {maximum}", f"it should be in bin {last}, the last one in use", advice)
