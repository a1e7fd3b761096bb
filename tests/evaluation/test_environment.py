"""What a report says of the machine that it was made on."""

import os
from pathlib import Path

import numpy as np
import pytest

from gircse.evaluation.environment import describe_environment


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_versions_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA H200, 580.159.04, 143771 MiB'")
    found = describe_environment()
    assert found["gpu"] == "NVIDIA H200, 580.159.04, 143771 MiB"
    assert found["numpy"] == np.__version__


def test_a_driver_that_fails_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo 'no devices were found'; exit 6")
    assert "gpu" not in describe_environment()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "gpu" not in describe_environment()
