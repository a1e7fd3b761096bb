"""An export as a newcomer's machine sees it: who may read the files, and what stands in the terminal."""

import os
import re
import subprocess
import sys
from pathlib import Path

from support.small_models import SmallModels, untrained_limits

from gircse.export.exporter import export_bundle
from gircse.export.options import ExportOptions


def test_every_file_honors_the_umask(small_models: SmallModels, tmp_path: Path) -> None:
    calibration = small_models.calibration("llama")
    before = os.umask(0o027)
    try:
        with untrained_limits():
            bundle = export_bundle(
                ExportOptions(
                    output=tmp_path / "bundle",
                    steps=5,
                    model=str(small_models.checkpoint("llama")),
                    max_tokens=48,
                    precisions=("fp32", "fp16", "int8"),
                    calibration=calibration,
                )
            )
    finally:
        os.umask(before)
    modes = {path.relative_to(bundle): path.stat().st_mode & 0o777 for path in [bundle, *bundle.rglob("*")]}
    assert modes == {name: 0o750 if (bundle / name).is_dir() else 0o640 for name in modes}
    assert Path("golden.safetensors") in modes


def test_no_warning_reaches_the_user(small_models: SmallModels, tmp_path: Path) -> None:
    """In a process of its own, because what pytest does to warnings is not what a terminal shows."""
    model = str(small_models.checkpoint("qwen2"))
    command = [sys.executable, "-m", "gircse.export.export_command", "--model", model, "--max-tokens", "32"]
    done = subprocess.run(
        [*command, "--precision", "fp32,fp16", "--output", str(tmp_path / "bundle")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\w*Warning\b|^warning:", done.stderr, re.MULTILINE)
    assert "compose 8 refinement steps" in done.stderr, "8 steps are the default"
