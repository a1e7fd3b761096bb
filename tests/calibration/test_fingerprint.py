"""A calibration belongs to the weights of one model, which its config alone does not identify."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_models import SmallModels

from gircse.calibration.fingerprint import fingerprint_of
from gircse.checkpoint.model_settings import ModelSettings
from gircse.checkpoint.source import resolve_checkpoint
from gircse.runtime.errors import CheckpointError


def test_fine_tuned_checkpoints_of_one_config_differ(small_models: SmallModels, tmp_path: Path) -> None:
    original, tuned = small_models.checkpoint("llama"), tmp_path / "tuned"
    shutil.copytree(original, tuned)
    weights = load_file(tuned / "model.safetensors")
    weights["model.norm.weight"] += 0.01 * torch.ones(48)
    save_file(weights, tuned / "model.safetensors")
    first, second = (fingerprint_of(resolve_checkpoint(str(path)), ModelSettings()) for path in (original, tuned))
    assert first.model.config_sha256 == second.model.config_sha256
    assert first.norm_sha256 != second.norm_sha256
    assert first.norm_sha256 == fingerprint_of(resolve_checkpoint(str(original)), ModelSettings(steps=3)).norm_sha256
    del weights["model.norm.weight"]
    save_file(weights, tuned / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no tensor model\.norm\.weight; .* Check --model\.$"):
        fingerprint_of(resolve_checkpoint(str(tuned)), ModelSettings())
    (tuned / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as safetensors"):
        fingerprint_of(resolve_checkpoint(str(tuned)), ModelSettings())
