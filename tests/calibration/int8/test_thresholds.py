"""Thresholds are what their formulas, and other implementations, say."""

import math

import numpy as np
import pytest
from onnxruntime.quantization.calibrate import HistogramCollector
from scipy.stats import entropy
from support.histograms import SAMPLES, histogram_of

from gircse.calibration.int8.histogram import BINS, MagnitudeHistogram
from gircse.calibration.int8.thresholds import (
    Method,
    entropy_divergences,
    entropy_threshold,
    max_threshold,
    mse_threshold,
    percentile_threshold,
    squared_errors,
    threshold,
)
from gircse.runtime.errors import OptionError


def squared_error(values: np.ndarray, clip_at: float) -> float:
    """Return the mean squared error of symmetric INT8 on the values themselves."""
    scale = clip_at / 127
    return float(np.mean((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2))


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("name", SAMPLES)
def test_thresholds_scale_with_the_values(name: str, method: Method) -> None:
    t = threshold(histogram_of(SAMPLES[name]), method)
    assert 0 < t <= np.abs(SAMPLES[name]).max()
    for power in (1, -1, 90, -90):
        assert threshold(histogram_of(np.ldexp(SAMPLES[name], power)), method) == math.ldexp(t, power)


def test_the_dispatch() -> None:
    histogram = histogram_of(SAMPLES["student"])
    functions = [max_threshold, percentile_threshold, entropy_threshold, mse_threshold]
    wanted = [function(histogram) for function in functions]
    assert [threshold(histogram, method) for method in Method] == wanted
    assert len(set(wanted)) == 4
    assert list(Method) == ["max", "percentile", "entropy", "mse"]


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("values", [[], [0.0], [0.0, -0.0, 0.0]])
def test_zeros_only(values: list[float], method: Method) -> None:
    histogram = histogram_of(values)
    assert (histogram.maximum, histogram.total, histogram.counts[0]) == (0, len(values), len(values))
    assert threshold(histogram, method) == 0


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("value", [1.0, 0.3, -1000.0, 1.999999, 1e-42])
@pytest.mark.parametrize("times", [1, 1000])
def test_a_single_value(value: float, method: Method, times: int) -> None:
    histogram = histogram_of(np.full(times, value))
    t = threshold(histogram, method)
    assert 0 <= histogram.maximum - t <= histogram.width
    if method in (Method.MAX, Method.ENTROPY):
        assert t == histogram.maximum


@pytest.mark.parametrize("name", SAMPLES)
def test_percentile(name: str) -> None:
    histogram, magnitudes = histogram_of(SAMPLES[name]), np.abs(SAMPLES[name])
    percentiles = np.concatenate([[1e-6], np.linspace(0.1, 99.9, 999), [99.99, 99.999, 99.9999, 100]])
    thresholds = [percentile_threshold(histogram, percentile) for percentile in percentiles]
    assert (np.diff(thresholds) >= 0).all()
    assert thresholds[-1] == histogram.maximum
    wanted = np.percentile(magnitudes, percentiles, method="inverted_cdf")
    assert np.abs(thresholds - wanted).max() <= histogram.width


def test_percentile_of_evenly_spread_values() -> None:
    histogram = histogram_of((np.arange(1_000_000) + 0.5) / 1_000_000)
    for percentile in (0.01, 12.345, 50, 99.99):
        assert percentile_threshold(histogram, percentile) == pytest.approx(percentile / 100, abs=histogram.width / 100)


@pytest.mark.parametrize("percentile", [0, -1, 100.01, math.nan])
def test_percentile_out_of_range(percentile: float) -> None:
    with pytest.raises(OptionError, match=rf"^percentile is {percentile}; it can be above 0, up to 100\.$"):
        percentile_threshold(histogram_of([1.0]), percentile)


@pytest.mark.parametrize("name", SAMPLES)
def test_mse_on_the_values_themselves(name: str) -> None:
    values = SAMPLES[name].astype(np.float64)
    histogram = histogram_of(values)
    error = squared_error(values, mse_threshold(histogram))
    assert error <= squared_error(values, histogram.maximum)
    best = min(squared_error(values, histogram.maximum * share) for share in np.geomspace(1 / 1024, 1, 1500))
    assert error <= 1.01 * best


@pytest.mark.parametrize("share", [1, 0.7, 0.3, 0.1, 127 / 2048 / 0.99, 0.05])
def test_squared_errors_are_those_of_the_values(share: float) -> None:
    """Evenly spread values, with thresholds down to scales narrower than a bin."""
    values = (np.arange(1_000_000) + 0.5) / 1_000_000 * 0.99
    histogram = histogram_of(values)
    wanted = squared_error(values, 0.99 * share)
    clipped = np.array([0.99 * share])
    assert squared_errors(histogram.counts, clipped, width=histogram.width)[0] == pytest.approx(wanted, rel=1e-3)


def test_control_bin_centers_see_another_error() -> None:
    """Where a scale is two bins wide, the centers of the bins, NVIDIA's formula, have errors a quarter too small."""
    values = np.append((np.arange(1_000_000) + 0.5) / 1_000_000 * 250 / 2048, 0.0)
    histogram = histogram_of(values).merge(histogram_of([0.75]))  # the limit is 1, 250 bins are in use
    used = histogram.counts[:250]
    centers = np.repeat((np.arange(250) + 0.5) / BINS, used)
    wanted = squared_error(values, 254 / BINS)
    (error,) = squared_errors(used, np.array([254 / BINS]), width=histogram.width)
    assert error == pytest.approx(wanted, rel=1e-3)
    assert squared_error(centers, 254 / BINS) == pytest.approx(0.75 * wanted, rel=1e-3)


def divergence_by_the_slide(kept: np.ndarray, *, clipped: int) -> float:
    """NVIDIA's pseudocode, literally: ``kept`` are bins 0 .. i-1, ``clipped`` the number of values in the others."""
    levels = np.arange(kept.size) * 128 // kept.size
    sums, bins = np.bincount(levels, kept), np.bincount(levels, kept > 0)
    candidate = np.where(kept > 0, sums[levels] / np.maximum(bins[levels], 1), 0)
    reference = kept.astype(np.float64)
    reference[-1] += clipped
    return float(entropy(reference, candidate)) if kept.any() else math.inf


@pytest.mark.parametrize("name", SAMPLES)
def test_entropy_is_that_of_the_slide(name: str) -> None:
    histogram = histogram_of(SAMPLES[name])
    counts = np.trim_zeros(histogram.counts, "b")
    tails = histogram.total - counts.cumsum()
    by_the_slide = [divergence_by_the_slide(counts[:i], clipped=tails[i - 1]) for i in range(128, counts.size + 1)]
    np.testing.assert_allclose(entropy_divergences(counts), by_the_slide, rtol=0, atol=1e-12)
    wanted = (128 + np.argmin(by_the_slide)) * histogram.width
    assert entropy_threshold(histogram) == min(wanted, histogram.maximum)


def test_control_entropy_that_forgets_what_it_clips() -> None:
    counts = np.trim_zeros(histogram_of(SAMPLES["normal"]).counts, "b")
    forgetful = [divergence_by_the_slide(counts[:i], clipped=0) for i in range(128, counts.size + 1)]
    assert np.argmin(forgetful) == 0  # 128 bins, hardly more than a tenth of the range
    assert entropy_divergences(counts).argmin() > 500


def test_entropy_clips_heavy_outliers_but_no_more_than_16_times() -> None:
    body = histogram_of(SAMPLES["normal"])
    clipped = entropy_threshold(histogram_of(SAMPLES["outliers"]))
    assert 0.5 * body.maximum < clipped <= 1.1 * body.maximum  # of 30
    assert entropy_threshold(histogram_of(SAMPLES["massive"])) >= 3000 / 16


def test_entropy_of_equals_takes_the_one_that_clips_least() -> None:
    assert entropy_threshold(histogram_of([0.25] * 9 + [0.75])) == 0.75  # clipping 0.75 to 0.25 has divergence 0 too


def onnxruntime_collector(method: str, *, quantized_bins: int = 128, percentile: float = 99.99) -> HistogramCollector:
    return HistogramCollector(method, True, BINS, quantized_bins, percentile, "same")


@pytest.mark.parametrize("percentile", [50, 99, 99.9, 99.99, 99.999])
@pytest.mark.parametrize("name", SAMPLES)
def test_percentile_against_onnxruntime(name: str, percentile: float) -> None:
    """On the same bins. Both find the same one; ONNX Runtime returns its lower edge, we interpolate: a bin at most."""
    histogram = histogram_of(SAMPLES[name])
    collector = onnxruntime_collector("percentile", percentile=percentile)
    low, high = np.float32(SAMPLES[name].min()), np.float32(histogram.maximum)
    collector.histogram_dict = {"x": (histogram.counts, histogram.edges.astype(np.float32), low, high)}
    theirs = float(collector.compute_percentile()["x"][1])
    ours = percentile_threshold(histogram, percentile)
    assert 0 <= ours - theirs <= histogram.width


def test_percentile_against_onnxruntime_from_the_values_on() -> None:
    """Its own bins, as many below the maximum as ours are below the limit: off by one of ours and one of its own."""
    collector = onnxruntime_collector("percentile")
    collector.collect({name: values for name, values in SAMPLES.items() if name != "relu"})
    for name, (_, theirs, *_) in collector.compute_percentile().items():
        histogram = histogram_of(SAMPLES[name])
        assert abs(percentile_threshold(histogram) - theirs) <= histogram.width + histogram.maximum / BINS


def cliff(bins: int, *, scale: float) -> MagnitudeHistogram:
    """A histogram that falls as exp(-x / scale) over some bins, in which few values lie beyond those bins."""
    rng = np.random.default_rng(4)
    counts = np.zeros(BINS, np.int64)
    counts[:bins] = rng.poisson(10_000 * np.exp(-np.arange(bins) / scale))
    counts[bins:1100] = rng.poisson(0.02, 1100 - bins)
    counts[1099] = 1
    return MagnitudeHistogram(counts=counts, limit=1.0, maximum=1099.5 / BINS)


def entropy_by_onnxruntime(histogram: MagnitudeHistogram) -> float:
    """Mirror the magnitudes, as its histogram is of signed values: 256 levels over both signs are 128 of magnitude."""
    counts = np.trim_zeros(histogram.counts, "b")
    edges = (np.arange(-counts.size, counts.size + 1) * histogram.width).astype(np.float32)
    fields = (np.concatenate([counts[::-1], counts]), edges, edges[0], edges[-1], edges[-1])
    return float(onnxruntime_collector("entropy").get_entropy_threshold(fields, 256)[1])


@pytest.mark.parametrize("scale", [300, 1e9])
@pytest.mark.parametrize("bins", [256, 384, 512])
def test_entropy_against_onnxruntime(bins: int, scale: float) -> None:
    """Both cut where the values end, ONNX Runtime a bin later: it keeps i bins of the left side and i + 1 of the right.

    Only where the number of bins is a multiple of 128: of others it gives those left over after the division to no
    level (``num_merged_bins``), so their divergence is large and it hardly ever cuts there.
    """
    histogram = cliff(bins, scale=scale)
    ours, theirs = entropy_threshold(histogram), entropy_by_onnxruntime(histogram)
    assert ours == bins * histogram.width
    assert abs(ours - theirs) <= 2 * histogram.width


@pytest.mark.parametrize("bins", [200, 300, 700])
def test_entropy_between_the_multiples_of_the_levels(bins: int) -> None:
    histogram = cliff(bins, scale=300)
    assert entropy_threshold(histogram) == bins * histogram.width
