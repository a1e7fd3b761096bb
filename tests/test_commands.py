"""The two commands as users run them: outputs, exit codes, messages."""

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from support.small_models import SmallModels

from gircse.export import export_command
from gircse.runtime import Embedder, embed_command


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    buffer = io.BytesIO()
    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": buffer}))
    return buffer


def feed(stdin: io.BytesIO, data: bytes) -> None:
    stdin.write(data)
    stdin.seek(0)


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
        (
            ["--steps", "2", "--adapter", "./nowhere"],
            "--adapter ./nowhere is neither a directory nor a Hugging Face id",
        ),
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


def test_embed_writes_npy_and_jsonl(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = small_models.bundle("qwen2")
    texts = ["first", "", "ünïcödé\ttab", "last line without newline"]
    source = tmp_path / "texts.txt"
    source.write_bytes("\n".join(texts).encode())
    wanted = Embedder(bundle).encode(texts, instruction="Find", steps=2)
    for name in ("x.npy", "x.jsonl"):
        arguments = [str(bundle), "--input", str(source), "--output", str(tmp_path / name), "--instruction", "Find"]
        assert embed_command.main([*arguments, "--steps", "2", "--batch-tokens", "64", "--threads", "2"]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / name)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), wanted, atol=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == texts
    np.testing.assert_allclose([row["embedding"] for row in rows], wanted, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"texts.txt", "x.npy", "x.jsonl"}


def test_embed_reads_stdin_and_writes_stdout(
    small_models: SmallModels, capsys: pytest.CaptureFixture[str], stdin: io.BytesIO
) -> None:
    feed(stdin, "\ufeffone\r\n\n two\u2028\x0c\n".encode())
    assert embed_command.main([str(small_models.bundle("qwen2"))]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    assert [row["text"] for row in rows] == ["one", "", " two\u2028\x0c"]


def test_embed_unpacks_gzip(small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "texts.txt.gz"
    source.write_bytes(gzip.compress(b"one\n\ntwo"))
    assert embed_command.main([str(small_models.bundle("qwen2")), "--input", str(source)]) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["one", "", "two"]


def test_embed_of_nothing(small_models: SmallModels, tmp_path: Path, stdin: io.BytesIO) -> None:
    assert embed_command.main([str(small_models.bundle("qwen2")), "--output", str(tmp_path / "x.npy")]) == 0
    assert np.load(tmp_path / "x.npy").shape == (0, 48)


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        (["--output", "x.csv"], b"a\n", "--output x.csv: ends in '.csv' | .npy or .jsonl"),
        (["--output", "no/such/x.npy"], b"a\n", "no directory no/such"),
        (["--input", "nowhere.txt"], b"", "nowhere.txt: No such file or directory | a text file that can be read |"),
        ([], b"fine\nbad \xff byte\n", "stdin, line 2: invalid start byte at byte 4 | UTF-8"),
        (["--steps", "9"], b"a\n", "steps: 9 | this bundle has 0..5"),
        (["--on-overflow", "error"], b"word " * 300, "texts[0]:"),
        (["--batch-tokens", "0"], b"a\n", "batch_tokens 0"),
        (["--precision", "fp8"], b"a\n", "precision 'fp8'"),
    ],
)
def test_embed_errors(
    small_models: SmallModels,
    capsys: pytest.CaptureFixture[str],
    stdin: io.BytesIO,
    arguments: list[str],
    data: bytes,
    message: str,
) -> None:
    feed(stdin, data)
    assert embed_command.main([str(small_models.bundle("qwen2")), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("gircse-embed: error: ")


def test_embed_without_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert embed_command.main([str(tmp_path)]) == 2
    assert "no gircse.json | a bundle directory" in capsys.readouterr().err


def test_self_test_exit_codes(
    small_models: SmallModels, small_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed_command.main([str(small_models.bundle("qwen2")), "--self-test"]) == 0
    assert "self-test passed: fp32 on cpu, 12 texts" in capsys.readouterr().out
    path = small_bundle / "fp32" / "weights.bin"
    weights = np.fromfile(path, np.float32)
    weights[len(weights) // 2 :] *= 1.05
    weights.tofile(path)
    assert embed_command.main([str(small_bundle), "--self-test", "--no-verify"]) == 1
    assert "self-test FAILED" in capsys.readouterr().out
