"""Calibrations of a small model, made while a test looks on."""

from pathlib import Path
from typing import Any

from gircse.calibration.calibrate import CalibrationOptions, calibrate
from gircse.calibration.calibration_file import Calibration
from support.small_models import CALIBRATION_TEXTS, SmallModels

CALIBRATION_STEPS = 2


def write_texts(tmp_path: Path, texts: list[str] = CALIBRATION_TEXTS) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def run_calibration(small_models: SmallModels, tmp_path: Path, **options: Any) -> Calibration:
    settings = {
        "texts": options.get("texts") or write_texts(tmp_path),
        "steps": CALIBRATION_STEPS,
        "output": tmp_path / "calibration.json",
        "model": str(small_models.checkpoint("llama")),
        "samples": 40,
        "max_drop": 1.0,
        **options,
    }
    return calibrate(CalibrationOptions(**settings))
