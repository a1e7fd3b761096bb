"""``gircse-embed-cpp`` against ``gircse-embed``: the same flags, messages, exit codes and bytes."""

import gzip
import io
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_models import SmallModels
from support.tolerances import CPP_MAX_DIFFERENCE, SMALL_MODEL_MAX_DIFFERENCE

from gircse.runtime import Embedder, embed_command
from gircse.runtime.vector_files import json_lines

FULL_DISK = Path("/dev/full")
PIPE_CLOSED = 141
INTERRUPTED = 130
WINDOW = 64
"""Texts of a window with ``--batch-size 2``."""

pytestmark = pytest.mark.usefixtures("find_onnxruntime")
needs_full_disk = pytest.mark.skipif(not FULL_DISK.exists(), reason="this system has no /dev/full")

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def bundle(small_models: SmallModels) -> Path:
    return small_models.bundle("qwen2")


@pytest.fixture
def start(cpp_command: Path, bundle: Path) -> Start:
    """Start the command on the small bundle."""

    def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([cpp_command, bundle, "--threads", "1", *arguments], **(streams | options))

    return start


def finish(process: subprocess.Popen[bytes], data: bytes = b"") -> tuple[int, bytes, str]:
    """Return exit code, stdout and stderr."""
    stdout, stderr = process.communicate(data if process.stdin else None)
    return process.returncode, stdout or b"", stderr.decode()


def numbered_lines(count: int) -> bytes:
    return b"".join(b"text number %d\n" % number for number in range(count))


def test_the_files_have_the_bytes_that_python_would_write(start: Start, bundle: Path, tmp_path: Path) -> None:
    texts = ["first", "", 'quotes " and \\', "ünïcödé\ttab \x00\x1f\x7f\u2028 \U0001f600", "last line without newline"]
    source = tmp_path / "texts.txt"
    source.write_bytes("\n".join(texts).encode())
    arguments = ["--input", source, "--instruction", "Find", "--steps", "2", "--batch-tokens", "64"]
    for name in ("x.npy", "x.jsonl"):
        done = finish(start(*arguments, "--output", tmp_path / name))
        assert done == (0, f"{tmp_path / name}\n".encode(), "")
    vectors = np.load(tmp_path / "x.npy")
    saved = io.BytesIO()
    np.save(saved, vectors)
    assert (tmp_path / "x.npy").read_bytes() == saved.getvalue()
    assert (tmp_path / "x.jsonl").read_text(encoding="utf-8") == "".join(json_lines(texts, vectors))
    with Embedder(bundle, threads=1) as embedder:
        wanted = embedder.encode(texts, instruction="Find", steps=2, batch_tokens=64)
    np.testing.assert_allclose(vectors, wanted, rtol=0, atol=CPP_MAX_DIFFERENCE)
    assert {path.name for path in tmp_path.iterdir()} == {"texts.txt", "x.npy", "x.jsonl"}


@pytest.mark.parametrize("lines", [0, 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_an_array_of_several_windows_is_the_file_of_np_save(start: Start, tmp_path: Path, lines: int) -> None:
    output = tmp_path / "x.npy"
    code, _, stderr = finish(start("--batch-size", "2", "--steps", "0", "--output", output), numbered_lines(lines))
    assert (code, stderr) == (0, "")
    loaded, saved = np.load(output), io.BytesIO()
    assert (loaded.dtype, loaded.shape) == (np.dtype("<f4"), (lines, 48))
    np.save(saved, loaded)
    assert output.read_bytes() == saved.getvalue()


def test_texts_are_the_lines_of_stdin(start: Start) -> None:
    code, stdout, stderr = finish(start("--steps", "0"), "\ufeffone\r\n\n two\u2028\x0c\r\r\n\ufeff\r".encode())
    assert (code, stderr) == (0, "")
    texts = [json.loads(line)["text"] for line in stdout.decode().split("\n")[:-1]]
    assert texts == ["one", "", " two\u2028\x0c\r", "\ufeff"]


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf"])
def test_nothing_gives_an_empty_array(start: Start, tmp_path: Path, data: bytes) -> None:
    assert finish(start("--output", tmp_path / "x.npy"), data)[0] == 0
    assert np.load(tmp_path / "x.npy").shape == (0, 48)
    assert finish(start(), data) == (0, b"", "")


def test_gzip_is_unpacked(start: Start, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt.gz"
    source.write_bytes(gzip.compress(b"one\n\ntwo") + gzip.compress(b"and a half\n"))  # as gzip -c >> appends
    code, stdout, stderr = finish(start("--input", source, "--steps", "0"))
    assert (code, stderr) == (0, "")
    assert [json.loads(line)["text"] for line in stdout.splitlines()] == ["one", "", "twoand a half"]


def test_lines_go_out_while_others_are_still_to_come(start: Start) -> None:
    with start("--batch-size", "2", "--steps", "0") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(numbered_lines(WINDOW))
        process.stdin.flush()
        first = [json.loads(process.stdout.readline())["text"] for _ in range(WINDOW)]
        stdout, stderr = process.communicate(b"the last line")
    assert first == numbered_lines(WINDOW).decode().splitlines()
    assert [json.loads(line)["text"] for line in stdout.splitlines()] == ["the last line"]
    assert stderr == b""


def python_error(
    arguments: list[str], data: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Return the exit code of ``gircse-embed`` and the last line that it says."""
    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": io.BytesIO(data)}))
    try:
        code = embed_command.main(arguments)
    except SystemExit as err:
        code = int(err.code or 0)
    return code, capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "data"),
    [
        ("", b""),
        ("BUNDLE another", b""),
        ("no/such/bundle", b""),
        ("--unknown BUNDLE", b""),
        ("BUNDLE --unknown 3 -5 -x", b""),
        ("BUNDLE -- --self-test", b""),
        ("BUNDLE --steps", b""),
        ("BUNDLE --steps --self-test", b""),
        ("BUNDLE --steps a", b""),
        ("BUNDLE --steps ''", b""),
        ("BUNDLE --steps=2.5", b""),
        ("BUNDLE --steps -1", b"a"),
        ("BUNDLE --steps 9", b"a"),
        ("BUNDLE --steps 1000", b"a"),
        ("BUNDLE --batch-size 0", b"a"),
        ("BUNDLE --batch-size -3", b"a"),
        ("BUNDLE --batch-tokens 0", b"a"),
        ("BUNDLE --batch-tokens -3", b"a"),
        ("BUNDLE --streams 0", b""),
        ("BUNDLE --streams -3", b""),
        ("BUNDLE --threads 0", b""),
        ("BUNDLE --threads -2", b""),
        ("BUNDLE --provider gpu", b""),
        ("BUNDLE --layout flat", b""),
        ("BUNDLE --precision fp8", b""),
        ("BUNDLE --on-overflow warn", b""),
        ("BUNDLE --self-test=yes", b""),
        ("BUNDLE --inst", b""),
        ("BUNDLE --la=x", b""),
        ("BUNDLE --batch 2", b""),
        ("BUNDLE --output x.csv", b""),
        ("BUNDLE --output .npy", b""),
        ('BUNDLE --output "it\'s.csv"', b""),
        ("BUNDLE --output no//such/./x.npy", b""),
        ("BUNDLE --output /proc/x.npy", b""),
        ("BUNDLE --input nowhere.txt", b""),
        ("BUNDLE --input /proc", b""),
        ("BUNDLE --input plain.gz", b""),
        ("BUNDLE --input short.gz", b""),
        ("BUNDLE --input broken.gz", b""),
        ("BUNDLE --input folder.gz", b""),
        ("BUNDLE", b"fine\nbad \xff byte\n"),
        ("BUNDLE", b"\xef\xbb\xbfcut \xe2\x82"),
        ("BUNDLE", b"overlong \xc0\x80"),
        ("BUNDLE", b"overlong \xe0\x80\x80"),
        ("BUNDLE", b"surrogate \xed\xa0\x80"),
        ("BUNDLE", b"above \xf4\x90\x80\x80"),
        ("BUNDLE", b"\xf0\x9f\x98 cut in the line"),
    ],
)
def test_errors_are_those_of_python(
    cpp_command: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    data: bytes,
) -> None:
    monkeypatch.chdir(tmp_path)
    packed = gzip.compress(b"some text, and more of it\n" * 9)
    Path("plain.gz").write_bytes(b"a plain text\n")
    Path("short.gz").write_bytes(packed[:-12])
    Path("broken.gz").write_bytes(packed[:10] + b"\xff" * 9 + packed[19:])
    Path("folder.gz").mkdir()
    before = set(tmp_path.iterdir())
    words = [str(bundle) if word == "BUNDLE" else word for word in shlex.split(arguments)]
    done = subprocess.run([cpp_command, *words], input=data, capture_output=True, check=False)
    code, said = python_error(words, data, monkeypatch, capsys)
    assert code == 2
    assert (done.returncode, done.stdout) == (code, b"")
    assert done.stderr.decode().splitlines()[-1] == said.replace("gircse-embed:", "gircse-embed-cpp:", 1)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("row", [1, WINDOW + 9])
def test_a_text_that_is_too_long_is_numbered_in_the_whole_input(start: Start, row: int) -> None:
    arguments = ["--steps", "0", "--batch-size", "2", "--on-overflow", "error"]
    code, stdout, stderr = finish(start(*arguments), numbered_lines(row) + b"word " * 300)
    assert (code, stdout.count(b"\n")) == (2, row // WINDOW * WINDOW)
    assert stderr.startswith(f"gircse-embed-cpp: error: texts[{row}] has ")
    assert " tokens; the bundle takes at most 48, the instruction included." in stderr


def test_the_flags_are_those_of_python(cpp_command: Path) -> None:
    shown = subprocess.run([cpp_command, "--help"], capture_output=True, text=True, check=True).stdout
    explained = {match[1]: match[2] for match in re.finditer(r"^  (--[\w-]+).*?  +(\S.*)$", shown, re.MULTILINE)}
    flags = {
        option: action.help
        for action in embed_command.build_parser()._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    assert explained.keys() - flags.keys() == {"--onnxruntime"}
    different = {"--provider", "--layout"}  # without engines there are fewer
    assert {flag: text for flag, text in flags.items() if flag not in different} == {
        flag: text for flag, text in explained.items() if flag not in different | {"--onnxruntime"}
    }


@pytest.mark.parametrize("name", ["x.npy", "x.jsonl"])
def test_an_error_in_a_later_window_leaves_no_file(start: Start, tmp_path: Path, name: str) -> None:
    arguments = ["--batch-size", "2", "--steps", "0", "--output", tmp_path / name]
    code, stdout, stderr = finish(start(*arguments), numbered_lines(WINDOW) + b"\xff\n")
    assert (code, stdout) == (2, b"")
    assert stderr.startswith(f"gircse-embed-cpp: error: stdin, line {WINDOW + 1}, is not UTF-8: invalid start byte")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x.npy", "x.jsonl"])
def test_an_interrupt_leaves_no_file(start: Start, tmp_path: Path, name: str) -> None:
    with start("--output", tmp_path / name) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.iterdir()):  # until the scratch file is there, and stdin is waited for
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait() == INTERRUPTED
        assert process.stderr is not None
        assert process.stderr.read() == b"gircse-embed-cpp: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_a_file_gets_the_permissions_of_the_umask(start: Start, tmp_path: Path) -> None:
    output = tmp_path / "x.jsonl"
    output.write_text("older")
    assert finish(start("--output", output, umask=0o027), b"one\n")[0] == 0
    assert output.stat().st_mode & 0o777 == 0o640
    assert json.loads(output.read_text())["text"] == "one"


@pytest.mark.parametrize("name", ["x.npy", "x.jsonl"])
def test_a_file_that_grows_too_large(start: Start, tmp_path: Path, name: str) -> None:
    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    process = start("--steps", "0", "--output", tmp_path / name, preexec_fn=limit_files)
    code, stdout, stderr = finish(process, numbered_lines(1000))
    assert (code, stdout) == (2, b"")
    wanted = (
        f"gircse-embed-cpp: error: --output {tmp_path / name} cannot be written: File too large. Check its directory"
    )
    assert stderr.startswith(wanted)
    assert list(tmp_path.iterdir()) == []


@needs_full_disk
@pytest.mark.parametrize("arguments", [[], ["--self-test"], ["--output", "x.npy"], ["--help"]])
def test_stdout_on_a_full_disk(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with FULL_DISK.open("wb") as full:
        code, _, stderr = finish(start(*arguments, stdout=full), b"one\n")
    wanted = "gircse-embed-cpp: error: stdout cannot be written: No space left on device. Check the free space.\n"
    assert (code, stderr) == (2, wanted)


@needs_full_disk
def test_an_error_that_cannot_be_said_keeps_its_exit_code(start: Start) -> None:
    with FULL_DISK.open("wb") as full:
        assert start("--steps", "99", stderr=full).wait() == 2


@pytest.mark.parametrize("arguments", [[], ["--self-test"], ["--help"]])
def test_a_closed_pipe_ends_the_command_quietly(start: Start, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start(*arguments, stdout=writing)
    os.close(writing)
    code, _, stderr = finish(process, b"one\n")
    assert (code, stderr) == (PIPE_CLOSED, "")


@pytest.mark.parametrize(("closed", "stream"), [(0, "stdin"), (1, "stdout")])
def test_a_stream_that_the_shell_has_closed(start: Start, tmp_path: Path, closed: int, stream: str) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("one\n")
    arguments = ["--input", source] if stream == "stdout" else []
    code, _, stderr = finish(start(*arguments, preexec_fn=lambda: os.close(closed)))
    assert code == 2
    assert stderr.startswith(f"gircse-embed-cpp: error: {stream} is closed. Redirect ")


def test_an_output_file_needs_no_stdout(start: Start, tmp_path: Path) -> None:
    """A file that is opened while stdout is closed would get its number, and what is printed would land in it."""
    output = tmp_path / "x.npy"
    code, _, stderr = finish(start("--output", output, preexec_fn=lambda: os.close(1)), b"one\n")
    assert (code, stderr) == (0, "")
    assert np.load(output).shape == (1, 48)


def test_texts_that_are_cut_are_counted_over_all_windows_in_the_words_of_python(start: Start, bundle: Path) -> None:
    data = b"fine\n" + b"word " * 200 + b"\n" + numbered_lines(WINDOW) + b"word " * 200
    arguments = ["--batch-size", "2", "--steps", "0"]
    code, stdout, stderr = finish(start(*arguments), data)
    assert (code, stdout.count(b"\n")) == (0, WINDOW + 3)
    python = [sys.executable, "-m", "gircse.runtime.embed_command", str(bundle), *arguments]
    said = subprocess.run(python, input=data, capture_output=True, check=True).stderr.decode()
    assert stderr == said.replace("gircse-embed:", "gircse-embed-cpp:")
    assert "2 of 67 texts were cut" in said


@pytest.mark.parametrize(
    ("release", "tolerance"),
    [("onnxruntime_library", CPP_MAX_DIFFERENCE), ("oldest_onnxruntime_library", SMALL_MODEL_MAX_DIFFERENCE)],
)
def test_the_flag_onnxruntime_names_the_library(
    start: Start,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    release: str,
    tolerance: float,
) -> None:
    monkeypatch.setenv("GIRCSE_ONNXRUNTIME", "/nowhere/libonnxruntime.so")
    library: Path = request.getfixturevalue(release)
    done = finish(start("--output", tmp_path / "x.npy", "--onnxruntime", library), numbered_lines(3))
    assert done == (0, f"{tmp_path / 'x.npy'}\n".encode(), "")
    with Embedder(bundle, threads=1) as embedder:
        wanted = embedder.encode(numbered_lines(3).decode().splitlines())
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), wanted, rtol=0, atol=tolerance)
    code, _, stderr = finish(start())
    assert code == 2
    assert "/nowhere/libonnxruntime.so" in stderr


def test_the_self_test_says_what_python_says(
    cpp_command: Path, bundle: Path, small_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_bundle / "fp32" / "weights.bin"
    weights = np.fromfile(path, np.float32)
    weights[len(weights) // 2 :] *= 1.05
    weights.tofile(path)
    for arguments, code in ([str(bundle)], 0), ([str(small_bundle), "--no-verify"], 1):
        done = subprocess.run([cpp_command, *arguments, "--self-test"], capture_output=True, text=True, check=False)
        assert embed_command.main([*arguments, "--self-test"]) == code
        said = capsys.readouterr().out
        assert (done.returncode, done.stderr) == (code, "")
        verdict, _, difference = done.stdout.rpartition(" ")
        assert verdict == said.rpartition(" ")[0]
        assert float(difference) == pytest.approx(float(said.rpartition(" ")[2]), abs=CPP_MAX_DIFFERENCE)
