"""How alike two sets of embeddings are: free functions on arrays.

A cosine between the two vectors of one text hides damage, because unrelated texts of a decoder LLM already have
cosines of 0.9. So the ranking of the similarities *between* texts is compared too.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from gircse.runtime.numerics import Float32, Float64

NEIGHBORS = 10
"""Neighbors compared for each text."""


def pairwise_rank_correlation(a: Float32, b: Float32) -> float:
    """Return the Spearman correlation of the cosine similarities of all pairs of texts.

    Args:
        a: (n, dim) float32 unit vectors.
        b: (n, dim') float32 unit vectors of the same texts.

    Returns:
        The correlation, or NaN where all similarities within ``a`` or within ``b`` are equal.
    """
    pairs = np.triu_indices(len(a), k=1)
    return rank_correlation(similarities(a, a)[pairs], similarities(b, b)[pairs])


def cross_rank_correlation(queries: Float32, documents: Float32, reference: Float32) -> float:
    """Return the Spearman correlation of query-document similarities with a reference's, over all pairs of two texts.

    Args:
        queries: (n, dim) float32 unit vectors.
        documents: (n, dim) float32 unit vectors of the same texts, from another number of steps.
        reference: (n, dim) float32 unit vectors of the same texts.
    """
    pairs = ~np.eye(len(queries), dtype=bool)
    return rank_correlation(similarities(queries, documents)[pairs], similarities(reference, reference)[pairs])


def rank_correlation(a: Float64, b: Float64) -> float:
    """Return the Spearman correlation of two series; NaN where one of them is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def neighbor_overlap(a: Float32, b: Float32) -> float:
    """Return the mean share of each text's ten nearest neighbors that ``a`` and ``b`` have in common.

    Args:
        a: (n, dim) float32 unit vectors, n > 10.
        b: (n, dim') float32 unit vectors of the same texts.
    """
    shared = [len(set(left) & set(right)) for left, right in zip(_neighbors(a), _neighbors(b), strict=True)]
    return float(np.mean(shared)) / NEIGHBORS


def similarities(a: Float32, b: Float32) -> Float64:
    """Return the cosines of all pairs (len(a), len(b)), in float64 so that nearly equal ones keep their order."""
    product: Float64 = a.astype(np.float64) @ b.astype(np.float64).T
    return product


def _neighbors(vectors: Float32) -> NDArray[np.intp]:
    scores = similarities(vectors, vectors)
    np.fill_diagonal(scores, -np.inf)
    return np.argpartition(-scores, NEIGHBORS - 1, axis=1)[:, :NEIGHBORS]
