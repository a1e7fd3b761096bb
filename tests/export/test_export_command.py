"""``gircse-export`` as users run it: output, exit codes, messages."""

from pathlib import Path

import pytest
from support.small_models import SmallModels

from gircse.export import export_command
from gircse.runtime import Embedder


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
        (["--steps", "65"], "--steps 65 | 0 to 64"),
        (["--steps", "2", "--max-tokens", "127"], "--max-tokens 127"),
        (["--steps", "2", "--temperature", "0"], "--temperature 0.0"),
        (["--steps", "2", "--temperature", "nan"], "--temperature nan"),
        (["--steps", "2", "--adapter", "./nowhere"], "--adapter ./nowhere: no such directory"),
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


@pytest.mark.parametrize("arguments", [[], ["--steps", "x"], ["--steps", "2", "--pooling", "max"], ["--stepz", "2"]])
def test_export_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        export_command.main(arguments)
    assert caught.value.code == 2
