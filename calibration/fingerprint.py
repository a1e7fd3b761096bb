"""Identifies what a calibration belongs to: a checkpoint, and the settings that it is used with."""

import hashlib

import torch

from gircse.calibration.calibration_file import ModelFingerprint
from gircse.checkpoint.model_settings import ModelSettings
from gircse.checkpoint.safetensors_index import open_safetensors
from gircse.checkpoint.source import Checkpoint
from gircse.runtime.errors import CheckpointError


def fingerprint_of(checkpoint: Checkpoint, settings: ModelSettings) -> ModelFingerprint:
    """Return the fingerprint of a checkpoint with settings.

    Raises:
        CheckpointError: the checkpoint has no ``model.norm.weight``, or a damaged shard.
    """
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
        with open_safetensors(shard) as file:
            if "model.norm.weight" in file.keys():
                weight = file.get_tensor("model.norm.weight").contiguous()
                return hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()
    raise CheckpointError(
        str(checkpoint.directory),
        "has no tensor model.norm.weight",
        "every decoder-only model has one",
        "Check --model.",
    )
