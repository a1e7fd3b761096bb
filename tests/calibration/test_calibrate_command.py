"""``gircse-calibrate`` as users run it: flags, exit codes, messages."""

from pathlib import Path
from typing import Any

import pytest
from support.small_calibration_run import write_texts
from support.small_models import SmallModels

from gircse.calibration import calibrate as calibrate_module
from gircse.calibration.calibrate_command import build_parser, main


def arguments(small_models: SmallModels, tmp_path: Path) -> list[str]:
    texts, model = write_texts(tmp_path), small_models.checkpoint("llama")
    return ["--texts", str(texts), "--model", str(model), "--steps", "1", "--samples", "32", "--max-drop", "1"]


def test_prints_the_path_last(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments(small_models, tmp_path), "--report", "report"]) == 0
    out, err = capsys.readouterr()
    assert out == "calibration.json\n"
    for part in (
        "estimated: ",
        "make soft tokens of 32 texts",
        "calibrate the layers",
        "int8: rank correlation 0.",
        "0 of 9 inputs excluded",
        "peak memory",
        "GiB",
    ):
        assert part in err
    assert (tmp_path / "calibration.moments.safetensors").is_file()
    assert (tmp_path / "report" / "calibration.md").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "65"], "--steps is 65; it can be 0 to 64."),
        (["--sensitivity", "some"], "argument --sensitivity: 'some' is none of full, kinds, off and auto"),
        (["--device", "elsewhere"], "--device elsewhere cannot be used: "),
        (["--dtype", "int8"], "argument --dtype: invalid"),
        (["--reference-memory", "0"], "argument --reference-memory: '0' is neither auto nor a number of GiB above 0"),
        (["--samples", "3"], "--samples is 3; it can be at least 32."),
        (["--report", "texts.txt"], "--report texts.txt cannot be written: File exists."),
        (["--texts", "nowhere.txt"], "nowhere.txt"),
        (["--output", "no/x.json"], "--output no/x.json cannot be written: No such file or directory."),
    ],
)
def test_errors(
    small_models: SmallModels,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code([*arguments(small_models, tmp_path), *more]) == 2
    assert f"gircse-calibrate: error: {message}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def exit_code(argv: list[str]) -> int:
    """Run the command as the shell does; argparse raises."""
    try:
        return main(argv)
    except SystemExit as err:
        return int(err.code or 0)


def test_a_memory_that_is_too_small_is_refused(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments(small_models, tmp_path), "--reference-memory", "0.1"]) == 2
    assert "error: the PyTorch model needs 1." in capsys.readouterr().err


def test_without_a_measurement_the_summary_says_so(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--sensitivity", "off", "--report", "report"]
    assert main([*arguments(small_models, tmp_path), *options]) == 0
    assert "int8: sensitivity not measured, so what it costs is unknown, 0 of 9 inputs" in capsys.readouterr().err


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_module, "calibrate", interrupt)
    assert main(["--texts", "x"]) == 130
    assert "gircse-calibrate: interrupted; the same command resumes it" in capsys.readouterr().err


def test_smoothing_is_a_number_or_auto(capsys: pytest.CaptureFixture[str]) -> None:
    assert build_parser().parse_args(["--texts", "x", "--smooth", "0.5"]).smooth == 0.5
    assert build_parser().parse_args(["--texts", "x", "--smooth", "auto"]).smooth is None
    with pytest.raises(SystemExit, match="2"):
        main(["--steps", "2", "--texts", "x", "--smooth", "abc"])
    assert "'abc' is neither a number nor auto; it can be 0 to 1, or auto" in capsys.readouterr().err
