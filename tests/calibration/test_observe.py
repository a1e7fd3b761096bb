"""The statistics are those of real tokens, and finite."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_calibration_run import run_calibration, write_texts
from support.small_models import CALIBRATION_TEXTS, SmallModels

from gircse.calibration import calibrate as calibrate_module
from gircse.calibration import corpus
from gircse.runtime.errors import CheckpointError


def test_nan_activations_are_named(small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = calibrate_module.load_reference

    @torch.no_grad()
    def damaged(checkpoint: Any, **options: Any) -> Any:
        model = load(checkpoint, **options)
        model.model.layers[1].mlp.gate_proj.weight[3] = float("nan")
        return model

    monkeypatch.setattr(calibrate_module, "load_reference", damaged)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.mlp_output has NaN or infinite values in the prompt, in FP32\."
    ):
        run_calibration(small_models, tmp_path)
    assert not (tmp_path / "calibration.json").exists()


def test_padding_is_not_observed(small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*CALIBRATION_TEXTS[:39], "x"]  # one very short text among longer ones
    batched = run_calibration(small_models, tmp_path, texts=write_texts(tmp_path, texts))
    monkeypatch.setattr(corpus, "BATCH_SIZE", 1)
    single = run_calibration(small_models, tmp_path, texts=write_texts(tmp_path, texts))
    for name, found in batched.inputs.items():
        if not found.smoothing:  # the search reads a sample, which differs
            assert found.ranges == pytest.approx(single.inputs[name].ranges, rel=1e-3)
