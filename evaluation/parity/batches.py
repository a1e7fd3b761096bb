"""The batches of a comparison: the same on both sides, and small enough that a large model's activations are few."""

from collections.abc import Iterator, Sequence

from gircse.runtime.embedder import DEFAULT_BATCH_SIZE, DEFAULT_BATCH_TOKENS
from gircse.runtime.manifest import GraphFacts, Manifest
from gircse.runtime.tokenization import TokenBatch, padded_batches

ACTIVATION_BYTES = 600 << 20
"""What the activations of one batch may take, about."""

MLP_FLOATS = 21
"""Floats of a token in the widest part of a layer, per element of its state: the MLP's, some four at a time."""


def batch_tokens(facts: GraphFacts) -> int:
    """Return the most tokens of a batch, padding included: the runtime's own limit, or less for a large model."""
    cache = 2 * 2 * facts.kv_size * facts.num_layers  # keys and values, as they are read and as they are written
    bytes_per_token = 4 * (cache + MLP_FLOATS * facts.hidden_size)
    return max(1, min(DEFAULT_BATCH_TOKENS, ACTIVATION_BYTES // bytes_per_token))


def side_batches(token_ids: Sequence[list[int]], manifest: Manifest) -> Iterator[TokenBatch]:
    """Sort texts into batches of like length."""
    return padded_batches(
        token_ids,
        pad_token_id=manifest.pad_token_id,
        batch_size=DEFAULT_BATCH_SIZE,
        batch_tokens=batch_tokens(manifest.graph),
    )
