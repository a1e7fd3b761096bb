"""Measures of similarity against values computed by hand."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from gircse.reporting.similarity import cross_rank_correlation, neighbor_overlap, pairwise_rank_correlation
from gircse.runtime.numerics import l2_normalize


def unit_vectors(n: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    return l2_normalize(np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32))


def test_rank_correlation_of_pairs_by_hand() -> None:
    a, b = unit_vectors(6), unit_vectors(6, seed=1)
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    wanted = spearmanr([a[i] @ a[j] for i, j in pairs], [b[i] @ b[j] for i, j in pairs]).statistic
    assert pairwise_rank_correlation(a, b) == pytest.approx(wanted, abs=1e-12)
    rotation = np.linalg.qr(np.random.default_rng(2).standard_normal((16, 16)))[0].astype(np.float32)
    assert pairwise_rank_correlation(a, a @ rotation) > 0.999  # a rotation keeps every similarity
    assert np.isnan(pairwise_rank_correlation(np.tile(a[:1], (6, 1)), a))


def test_cross_rank_correlation_leaves_out_the_diagonal() -> None:
    a, b = unit_vectors(5), unit_vectors(5, seed=1)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    wanted = spearmanr([a[i] @ b[j] for i, j in pairs], [a[i] @ a[j] for i, j in pairs]).statistic
    assert cross_rank_correlation(a, b, a) == pytest.approx(wanted, abs=1e-12)
    assert cross_rank_correlation(a, a, a) == pytest.approx(1)


def test_neighbor_overlap_by_hand() -> None:
    a, b = unit_vectors(30), unit_vectors(30, seed=1)

    def nearest(vectors: np.ndarray, row: int) -> set[int]:
        order = np.argsort(-(vectors @ vectors[row]))
        return {int(index) for index in order if index != row and list(order).index(index) <= 10}

    wanted = np.mean([len(nearest(a, row) & nearest(b, row)) / 10 for row in range(30)])
    assert neighbor_overlap(a, b) == pytest.approx(wanted)
    assert neighbor_overlap(a, a) == 1
