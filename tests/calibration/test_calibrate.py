"""``gircse-calibrate`` from end to end on a small model: what it refuses, and that an interruption leaves no trace."""

import errno
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.small_models import CALIBRATION_TEXTS, SmallModels

from gircse.calibration import calibrate as calibrate_module
from gircse.calibration import resume
from gircse.calibration.calibrate import CalibrationOptions, calibrate
from gircse.calibration.calibrate_command import main
from gircse.calibration.calibration_file import Calibration
from gircse.calibration.int8.scheme import InputKind, QuantizedInput, decoder_inputs
from gircse.calibration.int8.thresholds import Method
from gircse.calibration.observe import Observer
from gircse.calibration.sensitivity import measure_sensitivity
from gircse.reporting.progress import StageProgress
from gircse.runtime.atomic_file import atomic_write
from gircse.runtime.errors import CheckpointError, GircseError

STEPS = 2


def write_texts(tmp_path: Path, texts: list[str] = CALIBRATION_TEXTS) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def run(small_models: SmallModels, tmp_path: Path, **options: Any) -> Calibration:
    settings = {
        "texts": options.get("texts") or write_texts(tmp_path),
        "steps": STEPS,
        "output": tmp_path / "calibration.json",
        "model": str(small_models.checkpoint("llama")),
        "samples": 40,
        "max_drop": 1.0,
        **options,
    }
    return calibrate(CalibrationOptions(**settings))


def test_the_file_holds_every_input_and_step(small_models: SmallModels, tmp_path: Path) -> None:
    found = run(small_models, tmp_path)
    assert Calibration.read(tmp_path / "calibration.json") == found
    assert len(found.inputs) == 2 * 4 + 1
    for name, site in found.inputs.items():
        steps = site.ranges[1:] if name == "lm_head" else site.ranges
        assert len(site.ranges) == STEPS + 1
        assert min(steps) > 0
        assert site.thresholds == site.ranges  # max
    assert found.inputs["lm_head"].ranges[0] == 0, "the prompt has no vocabulary projection"
    smoothed = found.inputs["model.layers.0.attention_input"]
    assert len(smoothed.smoothing) == 48
    assert len(smoothed.outlier_channels) == 8
    assert {kind.name for kind in found.sensitivity.kinds} == {*map(str, InputKind), "soft-token mixing"}
    assert found.texts.samples == 40
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_thresholds_of_a_method_do_not_exceed_the_range(small_models: SmallModels, tmp_path: Path, method: str) -> None:
    found = run(small_models, tmp_path, method=Method(method))
    pairs = [(t, r) for site in found.inputs.values() for t, r in zip(site.thresholds, site.ranges, strict=True)]
    assert all(0 <= t <= r * (1 + 1e-5) for t, r in pairs)  # six digits are written
    assert any(t < 0.999 * r for t, r in pairs)


def test_a_small_drop_keeps_inputs_in_float(small_models: SmallModels, tmp_path: Path) -> None:
    found = run(small_models, tmp_path, max_drop=1e-4)
    assert found.sensitivity.excluded
    assert found.sensitivity.curve[0].name == "everything"


def test_interrupted_and_resumed_gives_the_same_bytes(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(small_models, tmp_path)
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
        run(small_models, tmp_path)
    assert seen == [0, 1]
    assert (tmp_path / "calibration.json.partial").is_file()
    monkeypatch.setattr(Observer, "observe", lambda self, *a, **k: (seen.append(self.batches), observe(self, *a, **k)))
    run(small_models, tmp_path)
    assert seen == [0, 1, 2], "the resumed run observes only what is left"
    assert (tmp_path / "calibration.json").read_bytes() == whole


def test_a_partial_of_other_settings_is_not_used(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(calibrate_module, "_smooth", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(small_models, tmp_path)
    monkeypatch.undo()
    other = run(small_models, tmp_path, seed=1)
    (tmp_path / "calibration.json").unlink()
    assert run(small_models, tmp_path, seed=1) == other


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (CALIBRATION_TEXTS[:5], "5 different texts | at least 32"),
        (["the same"] * 100, "1 different texts | at least 32"),
        ([""], "no text"),
    ],
)
def test_too_few_texts(small_models: SmallModels, tmp_path: Path, texts: list[str], message: str) -> None:
    with pytest.raises(GircseError, match=message.replace("|", r"\|")):
        run(small_models, tmp_path, texts=write_texts(tmp_path, texts))


def test_another_encoding(small_models: SmallModels, tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("für\n".encode("latin-1") * 40)
    with pytest.raises(GircseError, match="UTF-8"):
        run(small_models, tmp_path, texts=path)


@pytest.mark.parametrize(
    ("flag", "value"), [("samples", 3), ("smooth", 1.5), ("max_drop", -1.0), ("steps", 65), ("temperature", 0.0)]
)
def test_values_out_of_range(small_models: SmallModels, tmp_path: Path, flag: str, value: float) -> None:
    with pytest.raises(CheckpointError, match=f"--{flag.replace('_', '-')} {value}"):
        run(small_models, tmp_path, **{flag: value})


def test_nan_activations_are_named(small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = calibrate_module.load_reference

    @torch.no_grad()
    def damaged(checkpoint: Any) -> Any:
        model = load(checkpoint)
        model.model.layers[1].mlp.gate_proj.weight[3] = float("nan")
        return model

    monkeypatch.setattr(calibrate_module, "load_reference", damaged)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp_output: NaN or infinity in the prompt"):
        run(small_models, tmp_path)
    assert not (tmp_path / "calibration.json").exists()


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
    with pytest.raises(CheckpointError, match=r"--output .*No space left on device"):
        run(small_models, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"texts.txt", "calibration.json.partial"}


def test_a_folder_that_is_not_there(small_models: SmallModels, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--output"):
        run(small_models, tmp_path, output=tmp_path / "nowhere" / "calibration.json")


def test_padding_is_not_observed(small_models: SmallModels, tmp_path: Path) -> None:
    texts = [*CALIBRATION_TEXTS[:39], "x"]  # one very short text among longer ones
    alone = run(small_models, tmp_path, texts=write_texts(tmp_path, texts))
    calibrate_module.BATCH_SIZE, kept = 1, calibrate_module.BATCH_SIZE
    try:
        single = run(small_models, tmp_path, texts=write_texts(tmp_path, texts))
    finally:
        calibrate_module.BATCH_SIZE = kept
    for name, site in alone.inputs.items():
        if not site.smoothing:  # the search reads a sample, which differs
            assert site.ranges == pytest.approx(single.inputs[name].ranges, rel=1e-3)


def test_command_line_refuses_a_smoothing_of_letters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--steps", "2", "--texts", "x", "--smooth", "abc"])
    assert "abc | 0 to 1, or auto | choose another value" in capsys.readouterr().err


@dataclass(frozen=True)
class OneBadInput:
    """A study in which quantizing one input destroys the vectors and quantizing the others changes nothing."""

    bad: QuantizedInput
    sites: tuple[QuantizedInput, ...] = decoder_inputs(2)
    mixture: None = None

    def embed(self) -> np.ndarray:
        return np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)

    def embed_quantized(self, sites: Collection[QuantizedInput], *, mixture: Any) -> np.ndarray:
        seed = 1 if self.bad in sites else 0
        return np.random.default_rng(seed).normal(size=(12, 8)).astype(np.float32)


@pytest.mark.parametrize("index", [0, 5, 8])
def test_the_most_sensitive_input_is_kept_and_no_other(index: int) -> None:
    study: Any = OneBadInput(decoder_inputs(2)[index])
    found = measure_sensitivity(study, max_drop=0.01, progress=StageProgress())
    assert found.excluded == (study.bad.name,)
    assert found.result.rank_correlation == pytest.approx(1)
    assert found.curve[0].rank_correlation < 0.9
