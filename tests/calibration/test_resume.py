"""A calibration that was killed resumes, and the kill leaves no trace in the result."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_calibration_run import run_calibration, write_texts
from support.small_models import SmallModels

from gircse.calibration import calibrate as calibrate_module
from gircse.calibration import layers
from gircse.calibration.int8 import fake_quantization
from gircse.calibration.moments_file import moments_path
from gircse.calibration.resume import ResumeFolder

KILLED = """
import importlib, os, signal, sys
from gircse.calibration.calibrate_command import main
module, name, left = importlib.import_module(sys.argv[1]), sys.argv[2], int(sys.argv[3])
function = getattr(module, name)
def killed(*args, **options):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **options)
setattr(module, name, killed)
sys.exit(main(sys.argv[4:]))
"""
POINTS = (
    ("gircse.calibration.soft_tokens", "rest_of", 3, "estimated: "),  # of the second batch
    ("gircse.calibration.layers", "watched", 2, "the soft tokens of 10 of 40 texts, and 0 of 2"),  # layer 0 is observed
    (
        "gircse.calibration.layers",
        "round_weight",
        9,
        "the soft tokens of 40 of 40 texts, and 0 of 2",
    ),  # layer 1 has run
    ("gircse.calibration.resume", "save_file", 1, "40 texts, and 1 of 2"),  # the scratch file stays
    ("gircse.calibration.int8.fake_quantization", "dequantized", 12, "40 texts, and 1 of 2"),
    ("gircse.calibration.resume", "save_file", 3, "40 texts, and 2 of 2"),  # two parts of the sensitivity are done
    ("gircse.calibration.calibrate", "read_moments", 3, "40 texts, and 2 of 2"),  # half of the file is written
    ("gircse.calibration.calibrate", "read_moments", 99, "40 texts, and 2 of 2"),  # never
)


def test_killed_at_any_point_and_resumed_gives_the_same_bytes(small_models: SmallModels, tmp_path: Path) -> None:
    run_calibration(small_models, tmp_path, sensitivity="kinds")
    output = tmp_path / "calibration.json"
    whole = [path.read_bytes() for path in (output, moments_path(output))]
    for path in (output, moments_path(output)):
        path.unlink()
    command = ["--texts", str(write_texts(tmp_path)), "--model", str(small_models.checkpoint("llama")), "--steps", "2"]
    command += ["--samples", "40", "--max-drop", "1", "--output", str(output), "--sensitivity", "kinds"]
    for module, name, count, message in POINTS:
        assert not output.exists()
        arguments = [sys.executable, "-c", KILLED, module, name, str(count), *command]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert message in done.stderr
        assert done.returncode == (0 if count == 99 else -9), done.stderr
    assert [path.read_bytes() for path in (output, moments_path(output))] == whole
    assert not (tmp_path / "calibration.json.partial").exists()


def test_parts_of_other_settings_are_not_used(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate_module, "_measure", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_calibration(small_models, tmp_path)
    assert layers.finished_layers(ResumeFolder(tmp_path / "calibration.json.partial", identity=_identity(tmp_path)), 2)
    monkeypatch.undo()
    other = run_calibration(small_models, tmp_path, smooth=0.5)
    (tmp_path / "calibration.json").unlink()
    assert run_calibration(small_models, tmp_path, smooth=0.5) == other
    migrations = {one.migration for name, one in other.inputs.items() if name.endswith("_input")}
    assert migrations == {0.5}


def test_layers_that_are_done_are_not_run_again(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fake_quantization, "dequantized", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_calibration(small_models, tmp_path)
    monkeypatch.setattr(layers, "watched", _interrupt)
    assert len(run_calibration(small_models, tmp_path).inputs) == 9


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _identity(tmp_path: Path) -> str:
    return (tmp_path / "calibration.json.partial" / "identity.json").read_text()


def test_parts_are_those_of_one_run(tmp_path: Path) -> None:
    path = tmp_path / "x.partial"
    path.write_bytes(b"a state of version 0.1, a file")
    folder = ResumeFolder(path, identity="this run")
    assert folder.facts("one") is None
    folder.save("one", {"a": torch.arange(3)}, "facts")
    again = ResumeFolder(path, identity="this run")
    assert (again.facts("one"), again.names("one")) == ("facts", ["a"])
    assert again.tensor("one", "a").tolist() == [0, 1, 2]
    (path / "one.safetensors").write_bytes((path / "one.safetensors").read_bytes()[:20])
    assert again.facts("one") is None, "a damaged part is no part"
    folder.save("one", {"a": torch.arange(3)})
    assert ResumeFolder(path, identity="another run").facts("one") is None
    folder.remove()
    folder.remove()
    assert list(tmp_path.iterdir()) == []
