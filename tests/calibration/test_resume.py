"""An interrupted calibration resumes, and the interruption leaves no trace in the result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_calibration_run import run_calibration
from support.small_models import SmallModels

from gircse.calibration import calibrate as calibrate_module
from gircse.calibration import resume
from gircse.calibration.observe import Observer
from gircse.calibration.resume import ResumeState


def test_interrupted_and_resumed_gives_the_same_bytes(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_calibration(small_models, tmp_path)
    whole = (tmp_path / "calibration.json").read_bytes()
    (tmp_path / "calibration.json").unlink()
    observe = Observer.observe
    seen = []

    def interrupted(self: Observer, *args: Any, **kwargs: Any) -> None:
        if self.batches == 2:
            raise KeyboardInterrupt
        seen.append(self.batches)
        observe(self, *args, **kwargs)

    monkeypatch.setattr(Observer, "observe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_calibration(small_models, tmp_path)
    assert seen == [0, 1]
    assert (tmp_path / "calibration.json.partial").is_file()
    monkeypatch.setattr(Observer, "observe", lambda self, *a, **k: (seen.append(self.batches), observe(self, *a, **k)))
    run_calibration(small_models, tmp_path)
    assert seen == [0, 1, 2], "the resumed run observes only what is left"
    assert (tmp_path / "calibration.json").read_bytes() == whole


def test_a_partial_of_other_settings_is_not_used(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(calibrate_module, "_smooth", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_calibration(small_models, tmp_path)
    monkeypatch.undo()
    other = run_calibration(small_models, tmp_path, seed=1)
    (tmp_path / "calibration.json").unlink()
    assert run_calibration(small_models, tmp_path, seed=1) == other


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_state_is_of_one_run(tmp_path: Path) -> None:
    path = tmp_path / "x.partial"
    state = ResumeState(path, identity="this run")
    assert state.load() is None
    state.save({"a": torch.arange(3)})
    loaded = ResumeState(path, identity="this run").load()
    assert loaded is not None
    assert loaded["a"].tolist() == [0, 1, 2]
    assert ResumeState(path, identity="another run").load() is None
    path.write_bytes(path.read_bytes()[:20])
    assert state.load() is None, "a damaged state is no state"
    state.remove()
    state.remove()
    assert list(tmp_path.iterdir()) == []
