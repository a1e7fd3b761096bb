"""The second moments belong to one calibration and are read one input at a time."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from gircse.calibration.int8.gptq import add_moments, no_moments
from gircse.calibration.moments_file import MomentsFile, moments_path, write_moments
from gircse.runtime.bundle import file_sha256
from gircse.runtime.errors import CalibrationError

NAMES = ("model.layers.1.mlp_input", "model.layers.11.mlp_input")


@pytest.fixture
def calibration_path(tmp_path: Path) -> Path:
    """Return the path of a calibration with moments next to it."""
    path = tmp_path / "my.calibration.json"
    moments = small_moments()
    with moments_path(path).open("wb") as file:
        sha256 = write_moments(file, {NAMES[0]: 600, NAMES[1]: 3}, moments.__getitem__)
    assert sha256 == file_sha256(moments_path(path))
    return path


def small_moments() -> dict[str, list[torch.Tensor]]:
    moments = {NAMES[0]: no_moments(600), NAMES[1]: no_moments(3)}
    add_moments(moments[NAMES[0]], torch.linspace(-1, 1, 1200).reshape(2, 600))
    return moments


def test_every_input_is_read_back(calibration_path: Path) -> None:
    file = MomentsFile.open(calibration_path, file_sha256(moments_path(calibration_path)))
    for name, blocks in small_moments().items():
        assert all(torch.equal(a, b) for a, b in zip(file.read(name), blocks, strict=True))


def test_the_file_is_one_that_safetensors_writes(calibration_path: Path) -> None:
    tensors = {
        f"moments.{name}.{i}": block for name, blocks in small_moments().items() for i, block in enumerate(blocks)
    }
    written = load(moments_path(calibration_path).read_bytes())
    assert written.keys() == tensors.keys()
    assert len(moments_path(calibration_path).read_bytes()) == len(save(tensors))
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_an_input_without_moments_is_named(calibration_path: Path) -> None:
    file = MomentsFile.open(calibration_path, file_sha256(moments_path(calibration_path)))
    with pytest.raises(
        CalibrationError, match=r"my\.calibration\.moments\.safetensors has no moments of lm_head\. Calibrate"
    ):
        file.read("lm_head")


def test_moments_of_another_calibration_are_refused(calibration_path: Path) -> None:
    with pytest.raises(
        CalibrationError, match=rf"has SHA-256 [0-9a-f]{{64}}; my\.calibration\.json names {'0' * 64}\. Copy"
    ):
        MomentsFile.open(calibration_path, "0" * 64)


def test_moments_that_were_left_behind(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"needs x\.moments\.safetensors next to it.*No such file.*copy both\.$"):
        MomentsFile.open(tmp_path / "x.json", "0" * 64)
