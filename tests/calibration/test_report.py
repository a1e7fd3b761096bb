"""The report says what the calibration holds, and the same calibration gives the same bytes."""

from pathlib import Path

import msgspec
import pytest
from support.small_calibration import FINGERPRINT, ZERO, small_calibration

from gircse.calibration.calibration_file import Fidelity, Sensitivity, SensitivityMode
from gircse.calibration.report import markdown, write_report
from gircse.reporting.files import open_report_directory
from gircse.runtime.errors import OutputError

CHARTS = ["ranges-by-step", "migration", "error", "sensitivity"]


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
@pytest.mark.parametrize("steps", [0, 1, 2, 64])
def test_files_are_written(steps: int, tmp_path: Path) -> None:
    open_report_directory(tmp_path / "a" / "report")
    files = write_report(small_calibration(steps), tmp_path / "a" / "report")
    names = ["calibration.md", *(f"{name}.png" for name in (*CHARTS, "trade-off"))]
    assert [path.name for path in files] == names
    assert sorted(path.name for path in (tmp_path / "a" / "report").iterdir()) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files[1:])
    text = files[0].read_text(encoding="utf-8")
    assert [name for name in names[1:] if f"]({name})" not in text] == []


def test_trade_off_only_where_something_was_excluded(tmp_path: Path) -> None:
    calibration = small_calibration()
    nothing = msgspec.structs.replace(
        calibration.sensitivity, excluded=(), curve=(), result=Fidelity("everything", 0.9985, 0.96)
    )
    files = write_report(msgspec.structs.replace(calibration, sensitivity=nothing), tmp_path)
    assert [path.stem for path in files] == ["calibration", *CHARTS]
    text = files[0].read_text(encoding="utf-8")
    assert "trade-off" not in text
    assert (
        "No input is excluded from quantization: with all quantized the loss is 0.0015, and `--max-drop` is 0.005."
        in text
    )


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_zeros_only(tmp_path: Path) -> None:
    """There is no logarithm of 0: not of ranges, of losses, or of the limit."""
    calibration = small_calibration()
    inputs = dict.fromkeys(calibration.inputs, calibration.inputs[ZERO])
    exact = Fidelity("everything", 1.0, 1.0)
    layers = tuple(Fidelity(f"model.layers.{layer}", 1.0, 1.0) for layer in range(2))
    sensitivity = Sensitivity((), exact, (Fidelity("mlp_input", 1.0, 1.0),), layers, (exact,))
    zeros = msgspec.structs.replace(calibration, inputs=inputs, sensitivity=sensitivity, max_drop=0.0)
    assert len(write_report(zeros, tmp_path)) == 6
    assert "prompt / steps" not in markdown(zeros)


def test_same_calibration_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        open_report_directory(tmp_path / name)
        contents.append([path.read_bytes() for path in write_report(small_calibration(), tmp_path / name)])
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    "line",
    [
        r"| model | `local/mod\|el`, revision `abc123` |",
        "| adapter | `demo` |",
        "| K | 2, pooling mean, temperature 1 |",
        "| texts | 48 with 1234 tokens, seed 7, SHA-256 `4444444444444444` |",
        "| PyTorch | fp32 on cpu |",
        "| thresholds | by `entropy` |",
        "| 0.9965 | 0.925 | 2 of 9 |",
        "Excluded, the most sensitive first: `model.layers.0.mlp_output`, `lm_head`. With all inputs quantized the "
        "loss would be 0.062, and `--max-drop` is 0.005. So each input was quantized alone, and the fewest of the most "
        "sensitive ones were excluded that meet it: the loss is 0.0035.",
        "| mlp output | 2 | 800 | 3 | 0.008 | 0.002 |",
        "| vocabulary | 1 | - | 3 | 0.016 | 0.002 |",
        "| soft-token embedding | - | - | - | - | 0 |",
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
    assert "the loss is 0.0035. **This is still more than `--max-drop`.**" in markdown(stricter)


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    calibration = small_calibration()
    off = msgspec.structs.replace(calibration, sensitivity=Sensitivity((), None, (), (), (), SensitivityMode.OFF))
    assert [path.stem for path in write_report(off, tmp_path)] == [
        "calibration",
        "ranges-by-step",
        "migration",
        "error",
    ]
    text = markdown(off)
    assert "**Not measured** (`--sensitivity off`): no input is excluded from quantization" in text
    assert "Most sensitive layers" not in text
    assert "sensitivity.png" not in text


def test_kinds_alone_are_reported(tmp_path: Path) -> None:
    calibration = small_calibration()
    kinds = msgspec.structs.replace(calibration.sensitivity, layers=(), mode=SensitivityMode.KINDS)
    found = msgspec.structs.replace(calibration, sensitivity=kinds)
    assert [path.stem for path in write_report(found, tmp_path)] == ["calibration", *CHARTS, "trade-off"]
    text = markdown(found)
    assert "So inputs were ranked by the error of their product, and the fewest of the first ones" in text
    assert "each input was quantized alone" not in text
    assert "Most sensitive layers" not in text


def test_without_steps_there_is_no_vocabulary_and_no_soft_token() -> None:
    calibration = small_calibration(steps=0)
    text = markdown(calibration)
    assert "vocabulary" not in text
    assert "soft-token embedding" not in text
    assert "| 0.9965 | 0.925 | 1 of 8 |" in text
    assert "| mlp output | 2 | 800 | - |" in text
    assert calibration.soft_token is None


def test_without_adapter() -> None:
    fingerprint = msgspec.structs.replace(FINGERPRINT, adapter=None)
    assert "| adapter | none |" in markdown(msgspec.structs.replace(small_calibration(), fingerprint=fingerprint))


def test_directory_that_vanished(tmp_path: Path) -> None:
    message = (
        r"^--report .*gone cannot be written: No such file or directory; the calibration itself has been written\."
    )
    with pytest.raises(OutputError, match=message):
        write_report(small_calibration(), tmp_path / "gone")


def test_inputs_in_another_order_give_the_same_text() -> None:
    calibration = small_calibration()
    shuffled = msgspec.structs.replace(calibration, inputs=dict(sorted(calibration.inputs.items(), reverse=True)))
    assert markdown(shuffled) == markdown(calibration)
