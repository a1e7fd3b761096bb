"""Array types, and pooling and comparison of step states: free functions on arrays."""

import numpy as np
from numpy.typing import NDArray

from gircse.runtime.manifest import Pooling

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

L2_EPSILON = 1e-12
"""Smallest norm that is divided by, as in ``torch.nn.functional.normalize``."""


def l2_normalize(vectors: Float32) -> Float32:
    """Scale each vector of the last axis to unit length.

    Args:
        vectors: (..., dim) float32.

    Returns:
        (..., dim) float32.
    """
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: Float32 = vectors / np.maximum(norms, L2_EPSILON)
    return unit


def prefix_means(states: Float32) -> Float32:
    """Average the first k soft-token states, for every k.

    Args:
        states: (batch, K, dim) float32, h_1..h_K.

    Returns:
        (batch, K, dim) float32, row k-1 is mean(h_1..h_k), not normalized.
    """
    counts = np.arange(1, states.shape[1] + 1, dtype=np.float32)[:, None]
    means: Float32 = np.divide(np.cumsum(states, axis=1, dtype=np.float32), counts, dtype=np.float32)
    return means


def pool_states(states: Float32, pooling: Pooling) -> Float32:
    """Pool h_0..h_K for every number of steps, without normalizing.

    Args:
        states: (n, K + 1, dim) float32.
        pooling: ``mean`` or ``last``.

    Returns:
        (n, K + 1, dim) float32; row 0 is h_0, row k what z_k is before its normalization.
    """
    if pooling is Pooling.LAST:
        return states
    return np.concatenate([states[:, :1], prefix_means(states[:, 1:])], axis=1)


def row_cosine(a: Float32, b: Float32) -> NDArray[np.float64]:
    """Cosine of each vector of ``a`` with its counterpart in ``b``.

    Args:
        a: (..., dim) float32.
        b: (..., dim) float32.

    Returns:
        (...) float64, so that a cosine near 1 keeps its last digits.
    """
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    dots = (a64 * b64).sum(-1)
    norms = np.linalg.norm(a64, axis=-1) * np.linalg.norm(b64, axis=-1)
    cosines: NDArray[np.float64] = dots / np.maximum(norms, L2_EPSILON)
    return cosines
