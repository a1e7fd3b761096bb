"""The calibration from end to end on a small model: what the file holds, and what is refused."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.small_calibration_run import CALIBRATION_STEPS, run_calibration, write_texts
from support.small_models import SmallModels

from gircse.calibration import calibrate as calibrate_module
from gircse.calibration import layers
from gircse.calibration import plan as plan_module
from gircse.calibration.calibrate import CalibrationOptions, calibrate
from gircse.calibration.calibration_file import Calibration, Sensitivity, SensitivityMode
from gircse.calibration.int8.scheme import InputKind
from gircse.calibration.int8.thresholds import Method
from gircse.checkpoint import reference_choice
from gircse.checkpoint.model_config import read_model_config
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.streamed_model import StreamedModel
from gircse.checkpoint.streamed_reference import StreamedReference
from gircse.reporting.progress import StageProgress
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


def test_the_sensitivity_that_there_is_time_for(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_module, "FULL_SECONDS", 1e9)
    assert run_calibration(small_models, tmp_path).sensitivity.mode is SensitivityMode.FULL
    monkeypatch.setattr(plan_module, "FULL_SECONDS", 0.0)
    found = run_calibration(small_models, tmp_path, max_drop=0.0).sensitivity
    assert (found.mode, found.layers) == (SensitivityMode.KINDS, ())
    assert 1 < len(found.curve) <= 1 + plan_module.MIN_EVALUATIONS
    err = capsys.readouterr().err
    assert err.index("estimated: ") < err.index("make soft tokens")
    assert "sensitivity full" in err
    assert "sensitivity kinds" in err


def test_nothing_is_measured_where_nobody_wants_it(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = run_calibration(small_models, tmp_path, sensitivity=SensitivityMode.KINDS)
    monkeypatch.setattr(layers, "round_weight", None)  # nobody needs rounded weights
    found = run_calibration(small_models, tmp_path, sensitivity="off", max_drop=0.0)
    assert Calibration.read(tmp_path / "calibration.json") == found
    assert found.sensitivity == Sensitivity((), None, (), (), (), SensitivityMode.OFF)
    assert (found.inputs, found.soft_token) == (measured.inputs, measured.soft_token)
    assert found.moments_sha256 == measured.moments_sha256


def test_a_streamed_reference_gives_the_same_calibration(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(small_models.checkpoint("mistral-linear"))
    whole = run_calibration(small_models, tmp_path, model=model)
    opened: list[StreamedReference] = []

    def open_streamed(
        checkpoint: Any, options: Any, *, steps: int, allow_partial_adapter: bool, budget: Any
    ) -> StreamedReference:
        config = read_model_config(checkpoint.directory)
        weights = ModelWeights.open(checkpoint, config, steps=steps, allow_partial_adapter=allow_partial_adapter)
        opened.append(StreamedReference(StreamedModel(config, weights), group_bytes=1 << 30))
        return opened[-1]

    monkeypatch.setattr(calibrate_module, "open_reference", open_streamed)
    streamed = run_calibration(small_models, tmp_path, model=model)
    assert len(opened) == 2
    assert streamed.soft_token is not None
    assert whole.soft_token is not None
    assert streamed.soft_token.tail == pytest.approx(whole.soft_token.tail, rel=1e-3, abs=1e-6)
    for name, one in whole.inputs.items():
        assert streamed.inputs[name].ranges == pytest.approx(one.ranges, rel=1e-3)
    for one, other in zip(whole.sensitivity.kinds, streamed.sensitivity.kinds, strict=True):
        assert (one.name, one.rank_correlation) == (other.name, pytest.approx(other.rank_correlation, abs=0.01))


def test_what_the_layers_take_is_not_missing_for_the_sensitivity(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([1 << 40])
    monkeypatch.setattr(reference_choice, "available_memory", lambda: next(free, 0))
    run_calibration(small_models, tmp_path)
    assert next(free, None) is None


def test_bf16_is_near_fp32(small_models: SmallModels, tmp_path: Path) -> None:
    exact, found = (
        run_calibration(small_models, tmp_path, dtype=dtype, sensitivity="off") for dtype in ("fp32", "bf16")
    )
    name = "model.layers.0.attention_output"  # not smoothed
    assert [one.dtype for one in (exact, found)] == ["fp32", "bf16"]
    assert found.inputs[name].ranges != exact.inputs[name].ranges
    assert found.inputs[name].ranges[0] == pytest.approx(exact.inputs[name].ranges[0], rel=0.03)


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 16))
    monkeypatch.setattr(calibrate_module, "make_soft_tokens", None)
    with pytest.raises(OutputError, match=r"^--output .* has 0\.00 GiB of free disk; the calibration needs 0\.00 GiB"):
        run_calibration(small_models, tmp_path)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("samples", 3),
        ("smooth", 1.5),
        ("max_drop", -1.0),
        ("steps", 65),
        ("temperature", 0.0),
        ("seed", -1),
    ],
)
def test_values_out_of_range(small_models: SmallModels, tmp_path: Path, flag: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"^--{flag.replace('_', '-')} is {value}; it can be "):
        run_calibration(small_models, tmp_path, **{flag: value})


def test_an_unknown_sensitivity(small_models: SmallModels, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^--sensitivity is 'some'; it has to be one of full, kinds, off\.$"):
        run_calibration(small_models, tmp_path, sensitivity="some")


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

    monkeypatch.setattr(calibrate_module, "_make_soft_tokens", observe)
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


@pytest.mark.parametrize("sensitivity", [SensitivityMode.KINDS, SensitivityMode.FULL, None])
def test_memory_for_the_sensitivity_is_counted(
    small_models: SmallModels, tmp_path: Path, sensitivity: SensitivityMode | None
) -> None:
    """It replaces weights by rounded ones, so the model is in memory twice; None chooses one of the two."""
    texts = write_texts(tmp_path)
    measured, off = (
        calibrate_module._prepare(
            CalibrationOptions(
                steps=2,
                texts=texts,
                samples=40,
                output=tmp_path / "calibration.json",
                model=str(small_models.checkpoint("llama")),
                max_tokens=48,
                sensitivity=mode,
            ),
            StageProgress(),
        ).budget
        for mode in (sensitivity, SensitivityMode.OFF)
    )
    assert measured.whole - off.whole > sum(one.nbytes for one in small_models.load("llama").parameters())
