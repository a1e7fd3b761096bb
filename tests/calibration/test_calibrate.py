"""The calibration from end to end on a small model: what the file holds, and what is refused."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.small_calibration_run import CALIBRATION_STEPS, run_calibration, write_texts
from support.small_models import SmallModels

from gircse.calibration import calibrate as calibrate_module
from gircse.calibration.calibrate import CalibrationOptions, calibrate
from gircse.calibration.calibration_file import Calibration
from gircse.calibration.int8.scheme import InputKind
from gircse.calibration.int8.thresholds import Method
from gircse.runtime.atomic_file import atomic_write
from gircse.runtime.errors import OptionError, OutputError


def test_the_file_holds_every_input_and_step(small_models: SmallModels, tmp_path: Path) -> None:
    found = run_calibration(small_models, tmp_path)
    assert Calibration.read(tmp_path / "calibration.json") == found
    assert len(found.inputs) == 2 * 4 + 1
    for name, one in found.inputs.items():
        steps = one.ranges[1:] if name == "lm_head" else one.ranges
        assert len(one.ranges) == CALIBRATION_STEPS + 1
        assert min(steps) > 0
        assert one.thresholds == one.ranges  # max
    assert found.inputs["lm_head"].ranges[0] == 0, "the prompt has no vocabulary projection"
    smoothed = found.inputs["model.layers.0.attention_input"]
    assert len(smoothed.smoothing) == 48
    assert len(smoothed.outlier_channels) == 8
    assert {kind.name for kind in found.sensitivity.kinds} == {*map(str, InputKind), "soft-token embedding"}
    assert found.texts.samples == 40
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_thresholds_of_a_method_do_not_exceed_the_range(small_models: SmallModels, tmp_path: Path, method: str) -> None:
    found = run_calibration(small_models, tmp_path, method=Method(method))
    pairs = [(t, r) for one in found.inputs.values() for t, r in zip(one.thresholds, one.ranges, strict=True)]
    assert all(0 <= t <= r * (1 + 1e-5) for t, r in pairs)  # six digits are written
    assert any(t < 0.999 * r for t, r in pairs)


def test_a_small_drop_excludes_inputs(small_models: SmallModels, tmp_path: Path) -> None:
    found = run_calibration(small_models, tmp_path, max_drop=1e-4)
    assert found.sensitivity.excluded
    assert found.sensitivity.curve[0].name == "everything"
    assert found.sensitivity.curve[1].name.endswith(" excluded")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("samples", 3), ("smooth", 1.5), ("max_drop", -1.0), ("steps", 65), ("temperature", 0.0), ("seed", -1)],
)
def test_values_out_of_range(small_models: SmallModels, tmp_path: Path, flag: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"^--{flag.replace('_', '-')} is {value}; it can be "):
        run_calibration(small_models, tmp_path, **{flag: value})


@pytest.mark.parametrize("suffix", [".json", ".moments.safetensors"])
def test_a_full_disk_leaves_nothing_half_written(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def refuse(_: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    @contextmanager
    def full(path: Path) -> Iterator[Any]:
        with atomic_write(path) as file:
            yield SimpleNamespace(write=refuse) if path.name == f"calibration{suffix}" else file

    monkeypatch.setattr(calibrate_module, "atomic_write", full)
    with pytest.raises(
        OutputError, match=r"^--output .* cannot be written: No space left on device\. Free some space .* resumes"
    ):
        run_calibration(small_models, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"texts.txt", "calibration.json.partial"}


def test_texts_are_tokenized_as_an_export_does(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "truncation_side": "left"}
    (small_checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    observed: list[list[int]] = []

    class StopError(Exception):
        """Ends the run before the work."""

    def observe(run: Any) -> None:
        observed.extend(row.tolist() for batch in run.corpus.observed for row in batch.input_ids)
        raise StopError

    monkeypatch.setattr(calibrate_module, "_observe", observe)
    output, texts = tmp_path / "calibration.json", write_texts(tmp_path)
    options = CalibrationOptions(
        steps=1, output=output, texts=texts, model=str(small_checkpoint), max_tokens=4, add_eos=True
    )
    with pytest.raises(StopError):
        calibrate(options)
    assert {(len(row), row[-1]) for row in observed} == {(4, 0)}  # the end of every text, though all are cut


def test_a_directory_that_is_not_there(small_models: SmallModels, tmp_path: Path) -> None:
    with pytest.raises(
        OutputError, match=r"^--output .*calibration\.json cannot be written: No such file or directory\."
    ):
        run_calibration(small_models, tmp_path, output=tmp_path / "nowhere" / "calibration.json")
