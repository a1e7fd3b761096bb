"""Batches shrink with the model, so that a side's peak stays close to its weights."""

from typing import Any

import pytest
from support.small_models import SmallModels

from gircse.evaluation.parity.batches import batch_tokens, side_batches
from gircse.runtime.batch_planner import DEFAULT_BATCH_TOKENS
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import GraphFacts, Layout, Pooling

SHARED: dict[str, Any] = {
    "architecture": "llama", "layout": Layout.STEPWISE, "steps": 8, "pooling": Pooling.MEAN, "temperature": 1.0,
    "max_tokens": 512, "vocab_size": 1000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "low", "high"),
    [
        (
            {"hidden_size": 576, "num_layers": 30, "kv_size": 192},
            DEFAULT_BATCH_TOKENS,
            DEFAULT_BATCH_TOKENS,
        ),  # the demo
        ({"hidden_size": 3584, "num_layers": 28, "kv_size": 512}, 1000, 1300),  # Qwen2.5-7B: 0.6 GiB beside 8 in INT8
        ({"hidden_size": 4096, "num_layers": 32, "kv_size": 1024}, 600, 900),  # Mistral-7B
        ({"hidden_size": 10**6, "num_layers": 10**3, "kv_size": 10**6}, 1, 1),
    ],
)
def test_tokens_of_a_batch(sizes: dict[str, int], low: int, high: int) -> None:
    assert low <= batch_tokens(GraphFacts(**SHARED, **sizes)) <= high


def test_every_text_is_in_one_batch(small_models: SmallModels, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Bundle.open(small_models.bundle("llama")).manifest
    monkeypatch.setattr("gircse.evaluation.parity.batches.DEFAULT_BATCH_TOKENS", 12)
    batches = list(side_batches([[1] * length for length in (5, 1, 20, 6, 2)], manifest))
    assert sorted(row for batch in batches for row in batch.rows) == [0, 1, 2, 3, 4]
    assert all(batch.input_ids.size <= 12 or len(batch.rows) == 1 for batch in batches)
