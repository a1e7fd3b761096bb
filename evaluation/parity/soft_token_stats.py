"""What the softmax over the vocabulary looks like at each step."""

from dataclasses import dataclass

import numpy as np

from gircse.runtime.numerics import Float32


@dataclass(frozen=True)
class SoftTokenStats:
    """What the softmax over the vocabulary looks like, text by text and step by step; (n, K) float32 each.

    Attributes:
        entropy: in nats; ln(vocab) where all tokens are equally probable, 0 for a single token.
        top1_mass: probability of the top-1 token.
        padded_mass: probability on vocabulary rows that belong to no token.
        norm: length of the soft token s_k.
    """

    entropy: Float32
    top1_mass: Float32
    padded_mass: Float32
    norm: Float32


def soft_token_stats(probabilities: Float32, soft_tokens: Float32, *, tokens: int) -> SoftTokenStats:
    """Describe the soft tokens of one step.

    Args:
        probabilities: (n, vocab) float32.
        soft_tokens: (n, hidden) float32.
        tokens: tokens of the tokenizer; vocabulary rows from there on are padding.

    Returns:
        Arrays of shape (n,).
    """
    logs = np.log(np.where(probabilities > 0, probabilities, 1))
    return SoftTokenStats(
        entropy=-(probabilities * logs).sum(1, dtype=np.float64).astype(np.float32),
        top1_mass=probabilities.max(1),
        padded_mass=probabilities[:, tokens:].sum(1),
        norm=np.linalg.norm(soft_tokens, axis=1),
    )
