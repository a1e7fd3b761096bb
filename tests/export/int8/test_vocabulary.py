"""The soft token of INT8 variants: what the calibration measured, by the top-k tokens and by the whole sum."""

import json
from pathlib import Path

import pytest
import torch
from support.int8_bundles import export, int8_bundle, rounded_weights, run, written
from support.small_models import SmallModels
from support.tolerances import INT8_FAKE_MIN_COSINE
from support.vectors import PROMPTS, STEPS, padded

from gircse.calibration.calibration_file import Calibration
from gircse.calibration.int8 import fake_quantization
from gircse.calibration.int8.fake_quantization import quantized
from gircse.calibration.int8.scheme import decoder_inputs
from gircse.checkpoint.reference import refine
from gircse.export.int8 import vocabulary
from gircse.runtime.numerics import l2_normalize, row_cosine


@pytest.mark.parametrize(("high_entropy_mass", "max_sum"), [(0.0, vocabulary.MAX_SUM), (0.0, 10**6), (1.0, 10**6)])
def test_soft_token_is_what_the_sensitivity_measured(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, high_entropy_mass: float, max_sum: int
) -> None:
    """The vocabulary alone, one step: every row in the branch of the whole sum, with large sums or not; or none."""
    # Before the patches: both are kept for other tests.
    original = small_models.calibration("llama", steps=STEPS)
    exact = run(int8_bundle(small_models, "llama"), "fp32")
    monkeypatch.setattr(vocabulary, "MAX_SUM", max_sum)
    monkeypatch.setattr(vocabulary, "HIGH_ENTROPY_MASS", high_entropy_mass)
    monkeypatch.setattr(fake_quantization, "HIGH_ENTROPY_MASS", high_entropy_mass)
    content = json.loads(original.read_text())
    content["sensitivity"]["excluded"] = [entry.name for entry in decoder_inputs(2)[:-1]]
    path = written(content, original, tmp_path)
    ours = run(export(small_models, tmp_path / "bundle", path), "int8")
    model, calibration = small_models.load("llama"), Calibration.read(path)
    ids, mask = map(torch.from_numpy, padded(PROMPTS, left=True, extra=0))
    projection = decoder_inputs(2)[-1:]
    weights = rounded_weights(model, projection, original)
    variation = quantized(projection, calibration.inputs, weights.__getitem__, calibration.soft_token)
    with variation.changed(model, "", slice(None)):
        *_, state = refine(model, ids, mask, steps=1, temperature=1.0, reweight=variation.reweight)
    assert row_cosine(ours[:, 1], l2_normalize(state.hidden.numpy())).min() > INT8_FAKE_MIN_COSINE
    assert row_cosine(ours[:, 1], exact[:, 1]).min() > (0.999 if high_entropy_mass == 0.0 else 0.5)
