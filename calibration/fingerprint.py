"""What a calibration belongs to, found out from a checkpoint and the settings that it is used with."""

import hashlib

import torch
from safetensors import safe_open

from gircse.calibration.calibration_file import ModelFingerprint
from gircse.checkpoint.model_settings import ModelSettings
from gircse.checkpoint.source import Checkpoint
from gircse.runtime.errors import CheckpointError


def fingerprint_of(checkpoint: Checkpoint, settings: ModelSettings) -> ModelFingerprint:
    """Return what a calibration of this checkpoint with these settings belongs to."""
    return ModelFingerprint(
        checkpoint.model,
        _norm_sha256(checkpoint),
        checkpoint.adapter,
        settings.steps,
        settings.pooling,
        settings.temperature,
    )


def _norm_sha256(checkpoint: Checkpoint) -> str:
    for shard in checkpoint.shards:
        with safe_open(shard, framework="pt") as file:
            if "model.norm.weight" in file.keys():
                weight = file.get_tensor("model.norm.weight").contiguous()
                return hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()
    raise CheckpointError(
        f"{checkpoint.directory}: no tensor model.norm.weight | a decoder-only model | check the checkpoint"
    )
