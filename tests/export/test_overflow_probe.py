"""The largest magnitudes of the PyTorch reference, step by step."""

from typing import Any

import numpy as np
import pytest
from support.small_models import SmallModels
from support.vectors import PROMPTS

from gircse.checkpoint.reference import WholeReference
from gircse.export.overflow_probe import MagnitudeRecorder, Magnitudes
from gircse.runtime.batch_planner import padded_batches
from gircse.runtime.errors import CheckpointError


def magnitudes_of(model: Any, *, steps: int) -> Magnitudes:
    recorder = MagnitudeRecorder(steps)
    batches = list(padded_batches(PROMPTS, pad_token_id=0, batch_size=4, batch_tokens=99))
    with recorder.recording(model):
        for state in WholeReference(model).refine(batches, steps=steps, temperature=1.0):
            recorder.after(state.step)
    return recorder.found


def test_maxima_are_those_of_every_step(small_models: SmallModels) -> None:
    found = magnitudes_of(small_models.load("llama"), steps=2)
    assert len(found) == 2 * (7 * 2 + 1)
    assert all(maxima.shape == (3,) for maxima in found.values())
    assert found["lm_head output"][0] == 0.0  # the prompt has no logits
    first = magnitudes_of(small_models.load("llama"), steps=1)
    name = "model.layers.0.mlp.down_proj input"
    np.testing.assert_array_equal(first[name], found[name][:2])


def test_magnitudes_that_are_not_finite(small_models: SmallModels) -> None:
    model = small_models.load("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = np.inf
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.down_proj output has NaN or infinity at step 0, in FP32"
    ):
        magnitudes_of(model, steps=2)
