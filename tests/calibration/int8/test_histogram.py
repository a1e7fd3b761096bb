"""The histogram does not depend on the order or the batches of the values."""

import math

import numpy as np
import pytest
from support.histograms import SAMPLES, histogram_of

from gircse.calibration.int8.histogram import BINS, SMALLEST_LIMIT, MagnitudeHistogram
from gircse.runtime.errors import CheckpointError, OptionError


def assert_same(a: MagnitudeHistogram, b: MagnitudeHistogram) -> None:
    assert (a.limit, a.maximum, a.total) == (b.limit, b.maximum, b.total)
    np.testing.assert_array_equal(a.counts, b.counts)


@pytest.mark.parametrize("name", SAMPLES)
def test_counts_are_those_of_numpy(name: str) -> None:
    values = SAMPLES[name]
    histogram = histogram_of(values)
    assert histogram.maximum == np.abs(values).max()
    assert histogram.limit / 2 <= histogram.maximum < histogram.limit
    assert histogram.total == values.size
    assert (histogram.edges[0], histogram.edges[-1], histogram.edges.size) == (0, histogram.limit, BINS + 1)
    np.testing.assert_array_equal(histogram.counts, np.histogram(np.abs(values), bins=histogram.edges)[0])


@pytest.mark.parametrize("name", SAMPLES)
def test_order_and_batches_do_not_matter(name: str) -> None:
    values = SAMPLES[name]
    whole = histogram_of(values)
    assert_same(histogram_of(np.sort(np.abs(values))), whole)  # doubles as often as it can
    assert_same(histogram_of(*np.array_split(np.random.default_rng(1).permutation(values), 23)), whole)
    assert_same(histogram_of(values[:1], [], values[1:8].reshape(1, 7), -values[8:]), whole)
    assert_same(histogram_of(np.repeat(values, 2)[::2]), whole)  # not contiguous


def test_large_arrays_are_counted_whole() -> None:
    values = np.random.default_rng(2).standard_normal((3, 150_001)).astype(np.float32)
    assert_same(histogram_of(values), histogram_of(*values.T[:7], values[:, 7:]))


@pytest.mark.parametrize("other", SAMPLES)
def test_merge_is_the_union(other: str) -> None:
    a, b = histogram_of(SAMPLES["normal"]), histogram_of(SAMPLES[other])
    union = histogram_of(SAMPLES["normal"], SAMPLES[other])
    assert_same(a.merge(b), union)
    assert_same(b.merge(a), union)
    assert_same(a, histogram_of(SAMPLES["normal"]))
    assert_same(a.merge(MagnitudeHistogram()), a)
    assert_same(MagnitudeHistogram().merge(a), a)


@pytest.mark.parametrize("doublings", [1, 2, 10, 11, 12, 100])
def test_doubling_merges_bins_exactly(doublings: int) -> None:
    small = (np.arange(BINS) / BINS).astype(np.float32)  # one in each bin over [0, 1)
    histogram = histogram_of(small)
    np.testing.assert_array_equal(histogram.counts, 1)
    histogram.add(np.array([2.0**doublings * 0.75], np.float32), where="test")
    wanted = np.zeros(BINS, np.int64)
    together = min(2**doublings, BINS)
    wanted[: BINS // together] = together
    wanted[BINS * 3 // 4] += 1
    assert histogram.limit == 2.0**doublings
    np.testing.assert_array_equal(histogram.counts, wanted)


def test_bins_are_half_open() -> None:
    histogram = histogram_of([0.75, 0.5])
    assert (histogram.limit, np.flatnonzero(histogram.counts).tolist()) == (1, [BINS // 2, BINS * 3 // 4])
    histogram.add(np.ones(1, np.float32), where="test")  # the limit itself
    assert (histogram.limit, histogram.maximum) == (2, 1)
    assert np.flatnonzero(histogram.counts).tolist() == [BINS // 4, BINS * 3 // 8, BINS // 2]


@pytest.mark.parametrize("value", [2.0**-149, 1e-40, 2.0**-126, 1.0, 65504.0, float(np.finfo(np.float32).max)])
def test_every_float32_has_its_bin(value: float) -> None:
    value = float(np.float32(value))
    histogram = histogram_of([value, -value / 2])
    assert histogram.limit / 2 <= value < histogram.limit
    assert histogram.counts[int(value / histogram.width)] == 1
    assert histogram.total == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 70_000])
def test_values_that_are_not_finite_are_refused(bad: float, at: int) -> None:
    values = np.zeros(100_000, np.float32)
    values[at] = bad
    histogram = histogram_of([1.0])
    with pytest.raises(CheckpointError, match=r"^layer 3 has NaN or infinite values\. .* download it again\.$"):
        histogram.add(values, where="layer 3")
    assert_same(histogram, histogram_of([1.0]))


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^layer 3 has float16 values; float32 is needed\.$"):
        MagnitudeHistogram().add(np.ones(3, np.float16), where="layer 3")  # type: ignore[arg-type]


@pytest.mark.parametrize("batches", [[], [[]], [[0.0, -0.0]], [SAMPLES["normal"]]])
def test_fields_are_all_there_is_to_save(batches: list[np.ndarray]) -> None:
    saved = histogram_of(*batches)
    counts = saved.counts.copy()
    loaded = MagnitudeHistogram(counts=counts, limit=saved.limit, maximum=saved.maximum)
    counts[:] = 7  # what was passed is the caller's
    assert_same(loaded, saved)
    loaded.add(SAMPLES["student"], where="test")
    assert_same(loaded, histogram_of(*batches, SAMPLES["student"]))
    assert_same(saved, histogram_of(*batches))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"counts": np.zeros(BINS, np.int32)},
            r"counts are int32 \(2048,\), the smallest 0; they should be int64 \(2048,\), none",
        ),
        ({"counts": np.zeros(100, np.int64)}, r"int64 \(100,\)"),
        ({"counts": np.full(BINS, -1)}, r"the smallest -1"),
        ({"limit": 3.0}, r"limit is 3\.0 for a maximum of 1\.5; it should be the next power of two"),
        ({"limit": 4.0}, r"limit is 4\.0"),
        ({"maximum": math.nan}, r"a maximum of nan"),
        ({"maximum": -1.5}, r"a maximum of -1.5"),
        ({"maximum": 1.25}, r"maximum is 1\.25; it should be in bin 1536"),
        ({"limit": SMALLEST_LIMIT, "maximum": 0.0}, r"maximum is 0\.0"),
    ],
)
def test_fields_of_no_histogram_are_refused(wrong: dict[str, object], message: str) -> None:
    histogram = histogram_of([1.5, 0.25])
    fields = {"counts": histogram.counts, "limit": histogram.limit, "maximum": histogram.maximum}
    with pytest.raises(OptionError, match=message):
        MagnitudeHistogram(**(fields | wrong))  # type: ignore[arg-type]
