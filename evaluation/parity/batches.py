"""The batches of a comparison: the same on both sides, and small enough that a large model's activations are few."""

from collections.abc import Iterator, Sequence

import numpy as np

from gircse.runtime.batch_planner import DEFAULT_BATCH_SIZE, DEFAULT_BATCH_TOKENS, TokenBatch, padded_batches
from gircse.runtime.manifest import GraphFacts, Manifest

ACTIVATION_BYTES = 600 << 20
"""What the activations of one batch may take, about."""

MLP_FLOATS = 21
"""Floats of a token in the widest part of a layer, per element of its state: the MLP's, some four at a time."""


def batch_tokens(facts: GraphFacts) -> int:
    """Return the most tokens of a batch, padding included: the runtime's own limit, or less for a large model."""
    cache = 2 * 2 * facts.kv_size * facts.num_layers  # keys and values, as they are read and as they are written
    bytes_per_token = 4 * (cache + MLP_FLOATS * facts.hidden_size)
    return max(1, min(DEFAULT_BATCH_TOKENS, ACTIVATION_BYTES // bytes_per_token))


def spread_by_length(token_ids: Sequence[list[int]], count: int) -> list[int]:
    """Return which texts are evenly spread from the shortest to the longest: ``count`` of them, or all."""
    by_length = sorted(range(len(token_ids)), key=lambda row: len(token_ids[row]))
    spread = np.linspace(0, len(by_length) - 1, min(count, len(by_length))).round().astype(int)
    return [by_length[at] for at in spread]


def side_batches(token_ids: Sequence[list[int]], manifest: Manifest) -> Iterator[TokenBatch]:
    """Sort texts into batches of like length."""
    return padded_batches(
        token_ids,
        pad_token_id=manifest.pad_token_id,
        batch_size=DEFAULT_BATCH_SIZE,
        batch_tokens=batch_tokens(manifest.graph),
    )
