"""Identifies what a calibration belongs to: a checkpoint, and the settings that it is used with."""

import hashlib

import torch

from gircse.calibration.calibration_file import ModelFingerprint
from gircse.checkpoint.model_settings import ModelSettings
from gircse.checkpoint.safetensors_index import SafetensorsIndex, open_safetensors
from gircse.checkpoint.source import Checkpoint
from gircse.checkpoint.tensor_naming import FINAL_NORM, match_names
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
    stored = SafetensorsIndex(checkpoint.shards)
    names = match_names(stored.entries.keys(), {FINAL_NORM}, where=str(checkpoint.directory))
    if FINAL_NORM not in names.stored:
        raise CheckpointError(
            str(checkpoint.directory),
            f"has no tensor {FINAL_NORM}",
            "every decoder-only model has one",
            "Check --model.",
        )
    entry = stored.entries[names.stored[FINAL_NORM]]
    with open_safetensors(entry.file) as file:
        weight = file.get_tensor(entry.name).contiguous()
    return hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()
