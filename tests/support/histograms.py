"""Samples of the shapes that activations have, and histograms of them."""

import numpy as np

from gircse.calibration.int8.histogram import MagnitudeHistogram

N = 50_021  # not a round number: at a whole rank, the last digit of the percentile decides on which side it falls
RNG = np.random.default_rng(0)
SAMPLES: dict[str, np.ndarray] = {
    name: values.astype(np.float32)
    for name, values in {
        "normal": RNG.standard_normal(N),
        "laplace": RNG.laplace(size=N),
        "student": RNG.standard_t(3, N),
        "uniform": RNG.uniform(-3, 3, N),
        "relu": np.maximum(RNG.standard_normal(N), 0),
        "outliers": np.append(RNG.standard_normal(N), [30.0, -29.0, 28.5]),
        "massive": np.append(RNG.standard_normal(N), [-3000.0]),
    }.items()
}


def histogram_of(*batches: np.ndarray) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram()
    for batch in batches:
        histogram.add(np.asarray(batch, np.float32), where="test")
    return histogram
