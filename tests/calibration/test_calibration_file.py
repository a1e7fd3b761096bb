"""The file is read back as written; a damaged file, or one of another model, is refused."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.schema_documents import documented, schema_of
from support.small_calibration import EXCLUDED, FINGERPRINT, small_calibration

from gircse.calibration.calibration_file import (
    OLDEST_SCHEMA_VERSION,
    SCHEMA_VERSION,
    Calibration,
    Fidelity,
    SoftTokenCalibration,
)
from gircse.checkpoint.model_settings import ModelSettings
from gircse.runtime.errors import CalibrationError
from gircse.runtime.manifest import AdapterSource, ModelSource, Pooling, TokenizerKind
from gircse.runtime.precision import Precision


@pytest.fixture
def calibration_file(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.json"
    path.write_bytes(small_calibration().to_json())
    return path


def test_file_is_what_was_written(calibration_file: Path) -> None:
    calibration = Calibration.read(calibration_file)
    assert calibration == small_calibration()
    assert calibration.to_json() == calibration_file.read_bytes()
    assert calibration.inputs[EXCLUDED[0]].threshold == 800


def _with_input(**changes: Any) -> Calibration:
    calibration = small_calibration()
    changed = msgspec.structs.replace(calibration.inputs[EXCLUDED[0]], **changes)
    return msgspec.structs.replace(calibration, inputs={**calibration.inputs, EXCLUDED[0]: changed})


def _with_sensitivity(**changes: Any) -> Calibration:
    calibration = small_calibration()
    return msgspec.structs.replace(calibration, sensitivity=msgspec.structs.replace(calibration.sensitivity, **changes))


NAN, INFINITY = float("nan"), float("inf")
INPUT_MESSAGE = r"^The calibration holds NaN or infinity in input model\.layers\.0\.mlp_output\. Calibrate again\.$"


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (_with_input(ranges=(NAN, 1.0, 1.0)), INPUT_MESSAGE),
        (_with_input(thresholds=(1.0, INFINITY, 1.0)), INPUT_MESSAGE),
        (_with_input(smoothing=(1.0, -INFINITY)), INPUT_MESSAGE),
        (_with_input(error=NAN), INPUT_MESSAGE),
        (
            msgspec.structs.replace(small_calibration(), soft_token=SoftTokenCalibration(1, (NAN,))),
            r"calibration holds NaN or infinity in soft_token",
        ),
        (_with_sensitivity(result=Fidelity("x", NAN, 1.0)), r"calibration holds NaN or infinity in sensitivity"),
        (_with_sensitivity(kinds=(Fidelity("x", 1.0, NAN),)), r"calibration holds NaN or infinity in sensitivity"),
        (_with_sensitivity(layers=(Fidelity("x", NAN, 1.0),)), r"calibration holds NaN or infinity in sensitivity"),
        (_with_sensitivity(curve=(Fidelity("x", NAN, 1.0),)), r"calibration holds NaN or infinity in sensitivity"),
    ],
)
def test_numbers_that_are_not_finite_are_not_written(calibration: Calibration, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibration.to_json()


def _replaced(old: str, new: str) -> Any:
    def change(content: bytes) -> bytes:
        assert content.count(old.encode()) >= 1
        return content.replace(old.encode(), new.encode(), 1)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[: len(content) // 2], r"cannot be read: Input data was truncated\. Calibrate again"),
        (lambda _: b"", r"cannot be read: Input data was truncated\. Calibrate again with gircse-calibrate\.$"),
        (lambda _: b"{}", r"cannot be read: .* missing required field `schema_version`"),
        (
            _replaced(f'"schema_version":{SCHEMA_VERSION}', '"schema_version":99,"news":[]'),
            rf"has schema version 99; this gircse-deploy reads up to {SCHEMA_VERSION}\. Upgrade: .*gircse-deploy$",
        ),
        (
            _replaced(f'"schema_version":{SCHEMA_VERSION}', '"schema_version":1'),
            rf"has schema version 1; .* reads {OLDEST_SCHEMA_VERSION} to {SCHEMA_VERSION}\. Calibrate again",
        ),
        (_replaced("0.9375", "NaN"), r"cannot be read: JSON is malformed"),
        (_replaced("0.9375", "1e999"), r"cannot be read: Number out of range"),
        (_replaced("0.9375", "null"), r"cannot be read: Expected `float`, got `null`"),
        (_replaced('"method"', '"methods"'), r"cannot be read: .* unknown field `methods`"),
        (_replaced('"pooling":"mean"', '"pooling":"max"'), r"cannot be read: Invalid enum value 'max'"),
    ],
)
def test_damaged_files_are_refused(change: Any, message: str, calibration_file: Path) -> None:
    content = msgspec.json.encode(small_calibration())
    assert Calibration.read(calibration_file) == msgspec.json.decode(content, type=Calibration)
    calibration_file.write_bytes(change(content))
    with pytest.raises(CalibrationError, match=rf"^--calibration .*calibration\.json {message}"):
        Calibration.read(calibration_file)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    message = r"^--calibration .*none\.json cannot be read: No such file or directory\. Check the path\.$"
    with pytest.raises(CalibrationError, match=message):
        Calibration.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": ModelSource("x", None, "9" * 64)},
            rf"config\.json with SHA-256 {'1' * 64}; this export has {'9' * 64}\.",
        ),
        ({"norm_sha256": "9" * 64}, rf"model\.norm\.weight with SHA-256 {'2' * 64}; this export has {'9' * 64}\."),
        (
            {"adapter": AdapterSource("demo", None, "9" * 64)},
            rf"adapter with SHA-256 {'3' * 64}; this export has {'9' * 64}\.",
        ),
        ({"adapter": None}, rf"adapter with SHA-256 {'3' * 64}; this export has none\."),
        (
            {"steps": 3},
            r"steps 2; this export has 3\. Calibrate again with the same --model, --adapter, --steps, --pooling and",
        ),
        ({"pooling": Pooling.LAST}, r"pooling mean; this export has last\."),
        ({"temperature": 0.5}, r"temperature 1\.0; this export has 0\.5\."),
    ],
)
def test_calibration_of_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=rf"^--calibration some\.json was made with {message}"):
        small_calibration().check(msgspec.structs.replace(FINGERPRINT, **changes), Path("some.json"))


def test_names_and_revisions_do_not_matter() -> None:
    """The same files may have been copied elsewhere: their content counts."""
    model, adapter = ModelSource("elsewhere", None, "1" * 64), AdapterSource("copy", "main", "3" * 64)
    small_calibration().check(msgspec.structs.replace(FINGERPRINT, model=model, adapter=adapter), Path("some.json"))


def test_settings_are_those_of_the_model() -> None:
    """An export takes them as defaults, so they have to be fields of ``ModelSettings``."""
    settings = ModelSettings(**small_calibration().settings)
    assert settings == ModelSettings(steps=2, model="local/mod|el", adapter="demo", revision="abc123", max_tokens=48)
    without = msgspec.structs.replace(FINGERPRINT, adapter=None, pooling=Pooling.LAST, temperature=0.5)
    settings = ModelSettings(**msgspec.structs.replace(small_calibration(), fingerprint=without).settings)
    assert (settings.adapter, settings.pooling, settings.temperature) == ("none", Pooling.LAST, 0.5)
    read = msgspec.structs.replace(small_calibration(), tokenizer=TokenizerKind.AUTO, add_eos=True)
    settings = ModelSettings(**read.settings)
    assert (settings.tokenizer, settings.add_eos) == (TokenizerKind.AUTO, True)


def test_what_version_2_did_not_have(tmp_path: Path) -> None:
    content = json.loads(small_calibration().to_json())
    old = {name: value for name, value in content.items() if name not in ("tokenizer", "add_eos", "dtype", "device")}
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({**old, "schema_version": 2}))
    found = Calibration.read(path)
    assert (found.tokenizer, found.add_eos) == (TokenizerKind.JSON, False)
    assert (found.dtype, found.device) == (Precision.FP32, "cpu")


def test_schema_document_is_up_to_date() -> None:
    assert documented("calibration.schema.json") == schema_of(Calibration)
