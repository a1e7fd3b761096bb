"""Quantized variants of the small models, and calibrations that were changed by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from gircse.calibration.calibration_file import Calibration
from gircse.calibration.int8.fake_quantization import round_weight
from gircse.calibration.int8.gptq import RoundedWeight
from gircse.calibration.int8.scheme import InputKind, QuantizedInput
from gircse.calibration.moments_file import MomentsFile, moments_path
from gircse.export.exporter import export_bundle
from gircse.export.options import ExportOptions
from gircse.runtime.bundle import Bundle
from gircse.runtime.ort_session import open_session
from support.small_models import SmallModels, untrained_limits
from support.vectors import PROMPTS, STEPS, padded

INT8 = ("int8", "int8-weights", "int4-weights")
MODELS = ("llama", "llama-biased-llama3", "qwen2", "qwen3", "mistral-linear")


def int8_bundle(small_models: SmallModels, name: str) -> Path:
    return small_models.bundle(
        name, steps=STEPS, precisions=("fp32", *INT8), calibration=small_models.calibration(name, steps=STEPS)
    )


def states(session_outputs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    prompt, steps = session_outputs
    return np.concatenate([prompt[:, None], steps], axis=1)


def run(bundle: Path, precision: str, prompts: list[list[int]] = PROMPTS) -> np.ndarray:
    session = open_session(Bundle.open(bundle), precision, threads=1)
    return states(tuple(session.run(*padded(prompts, left=True), steps=STEPS)))


def written(content: Any, original: Path, folder: Path) -> Path:
    """Write a changed calibration, with the moments of the original beside it."""
    copy = folder / "changed.json"
    copy.write_text(json.dumps(content))
    shutil.copy(moments_path(original), moments_path(copy))
    return copy


def export(
    small_models: SmallModels, output: Path, calibration: Path | None, *, model: str = "llama", **options: Any
) -> Path:
    settings = {"steps": STEPS, "precisions": ("int8",), "max_tokens": 48, **options}
    with untrained_limits():
        return export_bundle(
            ExportOptions(output=output, model=str(small_models.checkpoint(model)), calibration=calibration, **settings)
        )


def rounded_weights(model: Any, inputs: tuple[QuantizedInput, ...], path: Path) -> dict[str, RoundedWeight]:
    """Return the rounded weights of some inputs, by projection."""
    calibration = Calibration.read(path)
    moments = MomentsFile.open(path, calibration.moments_sha256)
    weights: dict[str, RoundedWeight] = {}
    for entry in inputs:
        seen = None if entry.kind is InputKind.VOCABULARY else moments.read(entry.name)
        for name in entry.projections:
            weight = model.get_submodule(name).weight.detach()
            weights[name] = round_weight(weight, calibration.inputs[entry.name], seen)
    return weights
