"""The largest magnitudes of the PyTorch reference, step by step."""

import numpy as np
import pytest
from support.small_models import SmallModels
from support.vectors import PROMPTS

from gircse.export.overflow_probe import largest_magnitudes
from gircse.runtime.errors import CheckpointError
from gircse.runtime.tokenization import padded_batches


def test_maxima_are_those_of_every_step(small_models: SmallModels) -> None:
    batches = list(padded_batches(PROMPTS, pad_token_id=0, batch_size=4, batch_tokens=99))
    found = largest_magnitudes(small_models.load("llama"), batches, steps=2, temperature=1.0)
    assert len(found) == 2 * (7 * 2 + 1)
    assert all(maxima.shape == (3,) for maxima in found.values())
    assert found["lm_head output"][0] == 0.0  # the prompt has no logits
    first = largest_magnitudes(small_models.load("llama"), batches, steps=1, temperature=1.0)
    name = "model.layers.0.mlp.down_proj input"
    np.testing.assert_array_equal(first[name], found[name][:2])


def test_magnitudes_that_are_not_finite(small_models: SmallModels) -> None:
    model = small_models.load("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = np.inf
    batches = padded_batches(PROMPTS, pad_token_id=0, batch_size=4, batch_tokens=99)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.down_proj output has NaN or infinity at step 0, in FP32"
    ):
        largest_magnitudes(model, batches, steps=2, temperature=1.0)
