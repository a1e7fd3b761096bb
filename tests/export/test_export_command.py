"""``gircse-export`` as users run it: output, exit codes, messages, and where its settings come from."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.small_models import SmallModels, untrained_limits

from gircse.calibration import calibrate_command
from gircse.export import export_command
from gircse.export.options import ExportOptions
from gircse.runtime import Embedder
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import OptionError
from gircse.runtime.precision import Precision


def test_export_prints_the_path_last(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = export_command.main(
        ["--steps", "3", "--model", str(small_models.checkpoint("llama")), "--layout", "stepwise", "--max-tokens", "32"]
    )
    out, err = capsys.readouterr()
    assert code == 0
    assert Path(out.splitlines()[-1]) == tmp_path / "gircse-llama-3"
    for part in ("trace the llama decoder", "weights", "peak memory", "next: gircse-embed", "--self-test", "of disk"):
        assert part in err
    assert Embedder(out.strip()).manifest.graph.layout == "stepwise"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "65"], "--steps is 65; it can be 0 to 64."),
        (["--steps", "2", "--max-tokens", "127"], "--max-tokens 127"),
        (["--steps", "2", "--temperature", "0"], "--temperature is 0.0"),
        (["--steps", "2", "--temperature", "nan"], "--temperature is nan"),
        (["--steps", "2", "--adapter", "./nowhere"], "--adapter ./nowhere"),
        (["--query-instruction", "\ud800"], "--query-instruction has a character that UTF-8 cannot hold"),
        (["--precision", "int8"], "--precision int8 needs a --calibration. Make one: gircse-calibrate --steps 8"),
    ],
)
def test_export_errors(
    small_models: SmallModels,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    model = str(small_models.checkpoint("llama"))
    assert export_command.main([*arguments, "--model", model, "--output", str(tmp_path / "out")]) == 2
    assert f"gircse-export: error: {message}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["gemma3", "phi3"])
def test_int8_is_refused_where_it_does_not_exist(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """By both commands, before anything is loaded; the advice is followed in test_mixed_precision.py."""
    calibration, texts = small_models.calibration("llama", steps=2), tmp_path / "texts.txt"
    model, output = str(small_models.checkpoint(name)), str(tmp_path / "out")
    texts.write_text("\n".join(f"a text of number {index}" for index in range(64)))
    capsys.readouterr()
    flags = ["--model", model, "--steps", "2", "--max-tokens", "32", "--output", output]
    assert export_command.main([*flags, "--precision", "int8", "--calibration", str(calibration)]) == 2
    assert calibrate_command.main([*flags, "--texts", str(texts)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    wanted = "INT8 does not exist for the architecture"
    assert [line.partition(" error: ")[2].startswith(wanted) for line in errors] == [True, True], errors
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "x"],
        ["--pooling", "max"],
        ["--stepz", "2"],
        ["--precision", "fp16,fp4"],
        ["--keep-float32", "layers.1.mlp,"],
    ],
)
def test_export_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        export_command.main(arguments)
    assert caught.value.code == 2


def test_lists_are_separated_by_commas() -> None:
    args = export_command.build_parser().parse_args(
        ["--precision", "fp32, fp16", "--keep-float32", "layers.1.mlp,lm_head"]
    )
    assert args.precisions == (Precision.FP32, Precision.FP16)
    assert args.keep_float32 == ("layers.1.mlp", "lm_head")


def test_query_instruction_is_in_the_manifest(small_models: SmallModels, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["--steps", "1", "--model", str(small_models.checkpoint("llama")), "--max-tokens", "32"]
    arguments += [
        "--layout",
        "stepwise",
        "--output",
        str(output),
        "--query-instruction",
        "Finde Antworten, möglichst kurz",
    ]
    assert export_command.main(arguments) == 0
    assert Bundle.open(output).manifest.query_instruction == "Finde Antworten, möglichst kurz"


def test_model_settings_come_from_the_calibration(small_models: SmallModels, tmp_path: Path) -> None:
    """All that it was made with, unless a flag says otherwise."""
    calibration = small_models.calibration("llama", steps=5)
    output = tmp_path / "out"
    arguments = ["--calibration", str(calibration), "--precision", "int8", "--output", str(output)]
    model = ["--model", str(small_models.checkpoint("llama"))]
    with untrained_limits():
        assert export_command.main([*arguments, *model, "--max-tokens", "40"]) == 0
    manifest = Bundle.open(output).manifest
    assert manifest.model.name == "llama"
    assert (manifest.graph.steps, manifest.graph.max_tokens) == (5, 40)


def test_the_bundle_is_named_after_the_calibrated_model(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A local model goes by the name of its folder, which is looked for where the command runs."""
    calibration = small_models.calibration("llama", steps=5)
    monkeypatch.chdir(tmp_path)
    assert export_command.main(["--calibration", str(calibration), "--layout", "stepwise"]) == 2
    assert "--model is needed: what was used is a local directory, llama. Name where it is." in capsys.readouterr().err
    (tmp_path / "llama").symlink_to(small_models.checkpoint("llama"))
    assert export_command.main(["--calibration", str(calibration), "--layout", "stepwise"]) == 0
    assert Path(capsys.readouterr().out.strip()).name == "gircse-llama-5"


@pytest.mark.parametrize(("flag", "value"), [("--steps", "3"), ("--pooling", "last"), ("--temperature", "0.5")])
def test_flags_that_contradict_the_calibration(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    calibration = small_models.calibration("llama", steps=5)
    arguments = ["--calibration", str(calibration), "--precision", "int8", "--output", str(tmp_path / "out")]
    arguments += ["--model", str(small_models.checkpoint("llama"))]
    assert export_command.main([*arguments, flag, value]) == 2
    error = capsys.readouterr().err
    assert f"--calibration {calibration}" in error
    assert flag.removeprefix("--") in error
    assert not (tmp_path / "out").exists()


def test_a_calibration_that_is_not_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"schema_version": 2}))
    assert export_command.main(["--calibration", str(path)]) == 2
    assert f"gircse-export: error: --calibration {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layout": "rolled"}, r"^--layout is 'rolled'; it has to be one of unrolled, stepwise\.$"),
        ({"precisions": ("fp32", "int4")}, r"^--precision is 'int4'; it has to be one of fp32, "),
    ],
)
def test_options_from_python_are_checked_too(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ExportOptions(output=tmp_path / "bundle", **setting)
