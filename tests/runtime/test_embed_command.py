"""``gircse-embed`` as users run it: outputs, exit codes, messages."""

import errno
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_models import SmallModels

from gircse.runtime import Embedder, embed_command
from gircse.runtime import embedder as embedder_module


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    buffer = io.BytesIO()
    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": buffer}))
    return buffer


def feed(stdin: io.BytesIO, data: bytes) -> None:
    stdin.write(data)
    stdin.seek(0)


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
        assert embed_command.main([*arguments, "--steps", "2", "--batch-tokens", "64", "--streams", "2"]) == 0
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
        (["--output", "x.csv"], b"a\n", "--output x.csv ends in '.csv'; it has to end in .npy or .jsonl."),
        (
            ["--output", "no/such/x.npy"],
            b"a\n",
            "--output no/such/x.npy cannot be written; there is no directory no/such. Create it first.",
        ),
        (["--input", "nowhere.txt"], b"", "nowhere.txt cannot be read: No such file or directory. Check the path."),
        ([], b"fine\nbad \xff byte\n", "stdin, line 2, is not UTF-8: invalid start byte at byte 4."),
        (["--steps", "9"], b"a\n", "steps is 9; this bundle has 0 to 5."),
        (["--on-overflow", "error"], b"word " * 300, "texts[0] has "),
        (["--batch-tokens", "0"], b"a\n", "batch_tokens is 0; it has to be at least 1."),
        (["--streams", "0"], b"a\n", "streams is 0; it has to be at least 1."),
        (["--precision", "fp8"], b"a\n", "has no precision 'fp8'; it has fp32."),
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
    assert f"{tmp_path} is not a bundle; it has no gircse.json. Make one: gircse-export" in capsys.readouterr().err


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


@pytest.fixture
def windows_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedder_module, "WINDOW_BATCHES", 2)


def embed_in_twos(bundle: Path, *arguments: str) -> int:
    return embed_command.main([str(bundle), "--batch-size", "2", "--threads", "1", *arguments])


@pytest.mark.usefixtures("windows_of_four")
@pytest.mark.parametrize("lines", [0, 1, 4, 11])
def test_an_array_of_several_windows_is_the_file_of_np_save(
    small_models: SmallModels, tmp_path: Path, lines: int
) -> None:
    texts = [f"text {'word ' * (number % 5)}{number}" for number in range(lines)]
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    bundle, output = small_models.bundle("qwen2"), tmp_path / "x.npy"
    assert embed_in_twos(bundle, "--input", str(tmp_path / "texts.txt"), "--output", str(output)) == 0
    with Embedder(bundle, threads=1) as embedder:
        wanted = np.concatenate([np.empty((0, 48), np.float32), *embedder.encode_iter(texts, batch_size=2)])
    loaded = np.load(output)
    np.testing.assert_array_equal(loaded, wanted)
    assert (loaded.dtype, loaded.shape, loaded.flags["C_CONTIGUOUS"]) == (np.dtype("<f4"), (lines, 48), True)
    saved = io.BytesIO()
    np.save(saved, wanted)
    assert output.read_bytes() == saved.getvalue()


@pytest.mark.usefixtures("windows_of_four")
def test_lines_go_out_while_others_are_still_to_come(
    small_models: SmallModels, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The eighth line is read only after the first four are written; the whole input is never held."""
    written_before = []

    class Stdin:
        def __iter__(self) -> Any:
            for number in range(10):
                written_before.append(capsys.readouterr().out.count("\n"))
                yield f"line {number}\n".encode()

    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": Stdin()}))
    assert embed_in_twos(small_models.bundle("qwen2")) == 0
    assert written_before == [0, 0, 0, 0, 4, 0, 0, 0, 4, 0]
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["line 8", "line 9"]


@pytest.mark.usefixtures("windows_of_four")
@pytest.mark.parametrize("name", ["x.npy", "x.jsonl"])
def test_an_error_in_a_later_window_leaves_no_file(
    small_models: SmallModels, tmp_path: Path, stdin: io.BytesIO, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    feed(stdin, b"fine\n" * 9 + b"\xff\n")
    assert embed_in_twos(small_models.bundle("qwen2"), "--output", str(tmp_path / name)) == 2
    assert "stdin, line 10, is not UTF-8" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x.npy", "x.jsonl"])
def test_a_full_disk_is_blamed_on_the_output(
    small_models: SmallModels,
    tmp_path: Path,
    stdin: io.BytesIO,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embed_command, "write_npy", full)
    monkeypatch.setattr(embed_command, "json_lines", full)
    feed(stdin, b"one\n")
    assert embed_in_twos(small_models.bundle("qwen2"), "--output", str(tmp_path / name)) == 2
    wanted = f"gircse-embed: error: --output {tmp_path / name} cannot be written: No space left on device. Check"
    assert capsys.readouterr().err.startswith(wanted)
    assert list(tmp_path.iterdir()) == []


def test_truncation_is_counted_over_all_windows(
    small_models: SmallModels, stdin: io.BytesIO, caplog: pytest.LogCaptureFixture, windows_of_four: None
) -> None:
    feed(stdin, b"fine\n" * 5 + b"word " * 200 + b"\n" + b"fine\n" * 5 + b"word " * 200)
    assert embed_in_twos(small_models.bundle("qwen2")) == 0
    assert [record.getMessage() for record in caplog.records] == ["2 of 12 texts were cut to 48 tokens"]
