import numpy as np
import pytest

from gircse.runtime.numerics import l2_normalize, prefix_means, row_cosine


def test_prefix_means_by_hand() -> None:
    states = np.array([[[1, 0], [3, 4], [2, 2]]], np.float32)
    # (1,0); ((1+3)/2, (0+4)/2); ((1+3+2)/3, (0+4+2)/3)
    expected = np.array([[[1, 0], [2, 2], [2, 2]]], np.float32)
    np.testing.assert_allclose(prefix_means(states), expected, rtol=1e-6)
    assert prefix_means(states).dtype == np.float32


def test_l2_normalize_keeps_zero_vectors_finite() -> None:
    vectors = np.array([[3, 4], [0, 0]], np.float32)
    np.testing.assert_allclose(l2_normalize(vectors), [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_row_cosine_is_taken_row_by_row() -> None:
    a = np.array([[1, 0], [0, 2], [1, 1]], np.float32)
    b = np.array([[5, 0], [0, -1], [1, 0]], np.float32)
    np.testing.assert_allclose(row_cosine(a, b), [1, -1, 2**-0.5], rtol=1e-6)


def test_row_cosine_passes_nan_on() -> None:
    assert np.isnan(row_cosine(np.array([[np.nan, 1]], np.float32), np.ones((1, 2), np.float32)))[0]


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 1)])
def test_shapes(shape: tuple[int, ...]) -> None:
    states = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assert prefix_means(states).shape == l2_normalize(states).shape == shape
    assert row_cosine(states, states).shape == shape[:-1]
