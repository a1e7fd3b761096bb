"""A calibration as a file and as a report: nothing is written or read that is not finite, and the report says why."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.schema_documents import documented, schema_of

from gircse.calibration.calibration_file import (
    SCHEMA_VERSION,
    Calibration,
    Fidelity,
    InputCalibration,
    ModelFingerprint,
    Sensitivity,
    SoftTokenCalibration,
    TextsUsed,
)
from gircse.calibration.int8.scheme import InputKind, decoder_inputs
from gircse.calibration.report import markdown, prepare_report, write_report
from gircse.calibration.report_charts import calibrated_inputs, excluded_count, measured_parts, rank_loss
from gircse.runtime.errors import CheckpointError, MeasurementError
from gircse.runtime.manifest import AdapterSource, ModelSource, Pooling

KEPT = ("model.layers.0.mlp_output", "lm_head")
ZERO = "model.layers.1.mlp_output"
SUBJECT = ModelFingerprint(
    model=ModelSource("local/mod|el", "abc123", "1" * 64),
    norm_sha256="2" * 64,
    adapter=AdapterSource("demo", None, "3" * 64),
    steps=2,
    pooling=Pooling.MEAN,
    temperature=1.0,
)
CHARTS = ["ranges-by-step", "migration", "error", "sensitivity"]


def small_calibration(steps: int = 2) -> Calibration:
    """Two layers, of which the second has nothing in one input; two inputs have to be kept."""
    sites = {site.name: _site(site.kind, steps) for site in decoder_inputs(2)[: None if steps else -1]}
    sites[KEPT[0]] = _site(InputKind.MLP_OUTPUT, steps, prompt=800.0)
    sites[ZERO] = InputCalibration(None, (), (), (0.0,) * (steps + 1), (0.0,) * (steps + 1), 0.0)
    kinds = tuple(Fidelity(kind, 0.998, 0.95) for kind in InputKind)
    mixing = Fidelity("soft-token mixing", 1.0, 1.0)
    layers = (
        Fidelity("model.layers.0", 0.97, 0.8),
        Fidelity("model.layers.1", 0.9999, 0.99),
        Fidelity("lm_head", 0.99975, 0.99),
    )
    everything, one, two = (
        Fidelity("everything", 0.9375, 0.7),
        Fidelity("1 kept", 0.99, 0.85),
        Fidelity("2 kept", 0.9965, 0.925),
    )
    curve = (everything, one, two)
    return Calibration(
        schema_version=SCHEMA_VERSION,
        fingerprint=msgspec.structs.replace(SUBJECT, steps=steps),
        texts=TextsUsed("4" * 64, samples=48, tokens=1234, seed=7),
        method="entropy",
        max_drop=0.005,
        inputs=sites,
        moments_sha256="5" * 64,
        soft_token=SoftTokenCalibration(128, (0.5, -0.25)) if steps else None,
        sensitivity=Sensitivity(KEPT[: 2 if steps else 1], two, (*kinds, mixing), layers, curve),
        tools={"torch": "2.11.0", "gircse-deploy": "0.1.0"},
    )


def _site(kind: InputKind, steps: int, *, prompt: float = 4.0) -> InputCalibration:
    ranges = (0.0 if kind is InputKind.VOCABULARY else prompt, *(2.0 + step for step in range(steps)))
    migration = 0.5 if kind is InputKind.MLP_INPUT else None
    return InputCalibration(migration, (1.0, 2.0), (3,), ranges, ranges, 0.016)


@pytest.fixture
def calibration_file(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.json"
    path.write_bytes(small_calibration().to_json())
    return path


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
@pytest.mark.parametrize("steps", [0, 1, 2, 64])
def test_files_are_written(steps: int, tmp_path: Path) -> None:
    prepare_report(tmp_path / "a" / "report")
    files = write_report(small_calibration(steps), tmp_path / "a" / "report")
    names = ["calibration.md", *(f"{name}.png" for name in (*CHARTS, "trade-off"))]
    assert [path.name for path in files] == names
    assert sorted(path.name for path in (tmp_path / "a" / "report").iterdir()) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files[1:])
    text = files[0].read_text(encoding="utf-8")
    assert [name for name in names[1:] if f"]({name})" not in text] == []


def test_trade_off_only_where_something_was_kept(tmp_path: Path) -> None:
    calibration = small_calibration()
    nothing = msgspec.structs.replace(
        calibration.sensitivity, excluded=(), curve=(), result=Fidelity("everything", 0.9985, 0.96)
    )
    files = write_report(msgspec.structs.replace(calibration, sensitivity=nothing), tmp_path)
    assert [path.stem for path in files] == ["calibration", *CHARTS]
    text = files[0].read_text(encoding="utf-8")
    assert "trade-off" not in text
    assert "Nothing stays in float: all quantized, it loses 0.0015, and `--max-drop` is 0.005." in text


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_nothing_but_zeros(tmp_path: Path) -> None:
    """No logarithm of 0, neither of ranges nor of losses, nor of the limit."""
    calibration = small_calibration()
    sites = dict.fromkeys(calibration.inputs, calibration.inputs[ZERO])
    exact = Fidelity("everything", 1.0, 1.0)
    layers = tuple(Fidelity(f"model.layers.{layer}", 1.0, 1.0) for layer in range(2))
    sensitivity = Sensitivity((), exact, (Fidelity("mlp_input", 1.0, 1.0),), layers, (exact,))
    zeros = msgspec.structs.replace(calibration, inputs=sites, sensitivity=sensitivity, max_drop=0.0)
    assert len(write_report(zeros, tmp_path)) == 6
    assert "prompt / steps" not in markdown(zeros)


def test_same_calibration_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        prepare_report(tmp_path / name)
        contents.append([path.read_bytes() for path in write_report(small_calibration(), tmp_path / name)])
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    "line",
    [
        r"| model | `local/mod\|el`, revision `abc123` |",
        "| adapter | `demo` |",
        "| K | 2, pooling mean, temperature 1 |",
        "| texts | 48 with 1234 tokens, seed 7, SHA-256 `4444444444444444` |",
        "| thresholds | by `entropy` |",
        "| 0.9965 | 0.925 | 2 of 9 |",
        "These stay in float, most sensitive first: `model.layers.0.mlp_output`, `lm_head`. All quantized, it would lose "
        "0.062, and `--max-drop` is 0.005. So each input was quantized alone, and of those that lost most, the fewest are "
        "kept that meet it: the loss is 0.0035.",
        "| mlp output | 2 | 800 | 3 | 0.008 | 0.002 |",
        "| vocabulary | 1 | - | 3 | 0.016 | 0.002 |",
        "| soft-token mixing | - | - | - | - | 0 |",
        "| `model.layers.0` | 0.03 |\n| `lm_head` | 0.00025 |\n| `model.layers.1` | 0.0001 |",
        "| input | prompt | steps | prompt / steps |\n| --- | --- | --- | --- |\n"
        "| `model.layers.0.mlp_output` | 800 | 3 | 267 |\n| `model.layers.0.attention_input` | 4 | 3 | 1.33 |",
        "The 7 inputs where the two differ most.",
        "Made with torch 2.11.0, gircse-deploy 0.1.0.",
    ],
)
def test_markdown_says(line: str) -> None:
    assert f"\n{line}" in markdown(small_calibration())


def test_a_drop_that_is_still_too_large_is_not_hidden() -> None:
    stricter = msgspec.structs.replace(small_calibration(), max_drop=0.001)
    assert "the loss is 0.0035. **That is still more than `--max-drop`.**" in markdown(stricter)


def test_without_steps_there_is_no_vocabulary_and_no_mixture() -> None:
    calibration = small_calibration(steps=0)
    text = markdown(calibration)
    assert "vocabulary" not in text
    assert "mixing" not in text
    assert "| 0.9965 | 0.925 | 1 of 8 |" in text
    assert "| mlp output | 2 | 800 | - |" in text
    assert calibration.soft_token is None
    assert measured_parts(calibration) == list(InputKind)[:4]


def test_without_adapter() -> None:
    fingerprint = msgspec.structs.replace(SUBJECT, adapter=None)
    assert "| adapter | none |" in markdown(msgspec.structs.replace(small_calibration(), fingerprint=fingerprint))


def test_order_is_that_of_the_computation() -> None:
    calibration = small_calibration()
    shuffled = msgspec.structs.replace(calibration, inputs=dict(sorted(calibration.inputs.items(), reverse=True)))
    assert list(calibrated_inputs(shuffled)) == list(decoder_inputs(2))
    assert markdown(shuffled) == markdown(calibration)


def test_points_of_a_curve() -> None:
    assert [excluded_count(point) for point in small_calibration().sensitivity.curve] == [0, 1, 2]
    assert rank_loss(Fidelity("x", 1 + 1e-16, 1.0)) == 0
    assert rank_loss(Fidelity("x", 1 - 1e-15, 1.0)) == 0
    assert rank_loss(Fidelity("x", 0.75, 1.0)) == 0.25


@pytest.mark.parametrize("inside", ["", "report"])
def test_directory_that_cannot_be_written(inside: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(
        MeasurementError, match=r"^--report .*taken.* \| a directory that can be written \| choose anoth"
    ):
        prepare_report(tmp_path / "taken" / inside)
    assert (tmp_path / "taken").read_bytes() == b""


def test_directory_that_vanished(tmp_path: Path) -> None:
    with pytest.raises(
        MeasurementError, match=r"^--report .*gone: No such file or directory \| .* calibration itself is"
    ):
        write_report(small_calibration(), tmp_path / "gone")


def test_no_report() -> None:
    prepare_report(None)


def test_file_is_what_was_written(calibration_file: Path) -> None:
    calibration = Calibration.read(calibration_file)
    assert calibration == small_calibration()
    assert calibration.to_json() == calibration_file.read_bytes()
    assert calibration.inputs[KEPT[0]].threshold == 800


def _with_site(**changes: Any) -> Calibration:
    calibration = small_calibration()
    site = msgspec.structs.replace(calibration.inputs[KEPT[0]], **changes)
    return msgspec.structs.replace(calibration, inputs={**calibration.inputs, KEPT[0]: site})


def _with_sensitivity(**changes: Any) -> Calibration:
    calibration = small_calibration()
    return msgspec.structs.replace(calibration, sensitivity=msgspec.structs.replace(calibration.sensitivity, **changes))


NAN, INFINITY = float("nan"), float("inf")
SITE_MESSAGE = (
    r"^calibration: input model\.layers\.0\.mlp_output holds NaN or infinity \| finite numbers \| calibrate again$"
)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (_with_site(ranges=(NAN, 1.0, 1.0)), SITE_MESSAGE),
        (_with_site(thresholds=(1.0, INFINITY, 1.0)), SITE_MESSAGE),
        (_with_site(smoothing=(1.0, -INFINITY)), SITE_MESSAGE),
        (_with_site(error=NAN), SITE_MESSAGE),
        (
            msgspec.structs.replace(small_calibration(), soft_token=SoftTokenCalibration(1, (NAN,))),
            r"calibration: soft_token holds NaN or infinity",
        ),
        (_with_sensitivity(result=Fidelity("x", NAN, 1.0)), r"calibration: sensitivity holds NaN or infinity"),
        (_with_sensitivity(kinds=(Fidelity("x", 1.0, NAN),)), r"calibration: sensitivity holds NaN or infinity"),
        (_with_sensitivity(layers=(Fidelity("x", NAN, 1.0),)), r"calibration: sensitivity holds NaN or infinity"),
        (_with_sensitivity(curve=(Fidelity("x", NAN, 1.0),)), r"calibration: sensitivity holds NaN or infinity"),
    ],
)
def test_numbers_that_are_not_finite_are_not_written(calibration: Calibration, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        calibration.to_json()


def _replaced(old: str, new: str) -> Any:
    def change(content: bytes) -> bytes:
        assert content.count(old.encode()) >= 1
        return content.replace(old.encode(), new.encode(), 1)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content[: len(content) // 2],
            r"--calibration .*: Input data was truncated \| a file of gircse-",
        ),
        (
            lambda _: b"",
            r"--calibration .*: Input data was truncated \| a file of gircse-calibrate \| calibrate again$",
        ),
        (lambda _: b"{}", r"missing required field `schema_version` \| a file of gircse-calibrate"),
        (
            _replaced(f'"schema_version":{SCHEMA_VERSION}', '"schema_version":99,"news":[]'),
            rf"schema version 99 \| this gircse-deploy reads up to {SCHEMA_VERSION} \| upgrade: pip install -U gircse-deploy$",
        ),
        (_replaced("0.9375", "NaN"), r"--calibration .*: JSON is malformed.* \| a file of gircse-calibrate"),
        (_replaced("0.9375", "1e999"), r"--calibration .*: Number out of range .* \| a file of gircse-calibrate"),
        (
            _replaced("0.9375", "null"),
            r"--calibration .*: Expected `float`, got `null` .* \| a file of gircse-calibrate",
        ),
        (_replaced('"method"', '"methods"'), r"unknown field `methods` \| a file of gircse-calibrate"),
        (
            _replaced('"pooling":"mean"', '"pooling":"max"'),
            r"Invalid enum value 'max' .* \| a file of gircse-calibrate",
        ),
    ],
)
def test_damaged_files_are_refused(change: Any, message: str, calibration_file: Path) -> None:
    content = msgspec.json.encode(small_calibration())
    assert Calibration.read(calibration_file) == msgspec.json.decode(content, type=Calibration)
    calibration_file.write_bytes(change(content))
    with pytest.raises(CheckpointError, match=message):
        Calibration.read(calibration_file)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"^--calibration .*none\.json: No such file or directory \| a file of gircse"
    ):
        Calibration.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": ModelSource("x", None, "9" * 64)},
            rf"config\.json with SHA-256 {'1' * 64} \| {'9' * 64}, as this export",
        ),
        ({"norm_sha256": "9" * 64}, rf"model\.norm\.weight with SHA-256 {'2' * 64} \| {'9' * 64}, as"),
        ({"adapter": AdapterSource("demo", None, "9" * 64)}, rf"adapter with SHA-256 {'3' * 64} \| {'9' * 64}, as"),
        ({"adapter": None}, rf"adapter with SHA-256 {'3' * 64} \| None, as"),
        (
            {"steps": 3},
            r"steps 2 \| 3, as this export has \| calibrate again with the same --model, --adapter, --steps",
        ),
        ({"pooling": Pooling.LAST}, r"pooling mean \| last, as this export has"),
        ({"temperature": 0.5}, r"temperature 1\.0 \| 0\.5, as this export has"),
    ],
)
def test_calibration_of_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^--calibration some\.json: {message}"):
        small_calibration().check(msgspec.structs.replace(SUBJECT, **changes), Path("some.json"))


def test_names_and_revisions_do_not_matter() -> None:
    """The same files may lie elsewhere: what they contain counts."""
    model, adapter = ModelSource("elsewhere", None, "1" * 64), AdapterSource("copy", "main", "3" * 64)
    small_calibration().check(msgspec.structs.replace(SUBJECT, model=model, adapter=adapter), Path("some.json"))


def test_schema_document_is_up_to_date() -> None:
    assert documented("calibration.schema.json") == schema_of(Calibration)
