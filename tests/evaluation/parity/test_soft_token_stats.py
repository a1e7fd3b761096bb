"""What the softmax over the vocabulary looks like, against values computed by hand."""

import numpy as np

from gircse.evaluation.parity.soft_token_stats import soft_token_stats


def test_soft_token_stats_by_hand() -> None:
    probabilities = np.array([[0.5, 0.25, 0.25, 0], [1, 0, 0, 0], [0.1, 0.1, 0.1, 0.7]], np.float32)
    stats = soft_token_stats(probabilities, np.array([[3, 4], [0, 1], [0, 0]], np.float32), tokens=3)
    np.testing.assert_allclose(stats.entropy[:2], [1.5 * np.log(2), 0], rtol=1e-6)
    np.testing.assert_allclose(stats.top1_mass, [0.5, 1, 0.7])
    np.testing.assert_allclose(stats.padded_mass, [0, 0, 0.7])
    np.testing.assert_allclose(stats.norm, [5, 1, 0])
