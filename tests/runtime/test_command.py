"""The frame of every command, as a process of its own: pipes that are closed, disks that are full."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_models import SmallModels

from gircse.runtime.command import run_command

FULL_DISK = Path("/dev/full")
PIPE_CLOSED = 141

needs_full_disk = pytest.mark.skipif(not FULL_DISK.exists(), reason="this system has no /dev/full")
buffering = pytest.mark.parametrize("unbuffered", ["", "1"])

COMMAND = """
import sys
from gircse.runtime.command import run_command
def work():
    for number in range(int(sys.argv[1])):
        print("a line", number)
    return 1
sys.exit(run_command("gircse-test", work, extras="cpu"))
"""


def start(*arguments: str, stdout: int, unbuffered: str = "", **others: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=environment,
        **others,  # type: ignore[call-overload]
    )


def into_closed_pipe(*arguments: str, unbuffered: str = "") -> tuple[int, bytes]:
    """Return exit code and stderr of a command whose output nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    process = start(*arguments, stdout=writing, unbuffered=unbuffered)
    os.close(writing)
    _, stderr = process.communicate()
    return process.returncode, stderr


def onto_full_disk(*arguments: str, unbuffered: str = "") -> tuple[int, bytes]:
    with FULL_DISK.open("wb") as full:
        process = start(*arguments, stdout=full.fileno(), unbuffered=unbuffered)
        _, stderr = process.communicate()
    return process.returncode, stderr


@buffering
@pytest.mark.parametrize("lines", ["1", "20000"])
def test_a_closed_pipe_ends_a_command_quietly(lines: str, unbuffered: str) -> None:
    assert into_closed_pipe("-c", COMMAND, lines, unbuffered=unbuffered) == (PIPE_CLOSED, b"")


def test_a_command_that_writes_nothing_has_its_own_exit_code() -> None:
    assert into_closed_pipe("-c", COMMAND, "0") == (1, b"")


@needs_full_disk
@pytest.mark.parametrize("lines", ["1", "20000"])
def test_a_full_disk_is_named(lines: str) -> None:
    code, stderr = onto_full_disk("-c", COMMAND, lines)
    assert code == 2
    assert stderr.startswith(b"gircse-test: error: ")
    assert b"No space left on device" in stderr
    assert b"Errno" not in stderr
    assert stderr.count(b"\n") == 1


@needs_full_disk
def test_an_error_that_cannot_be_said_keeps_its_exit_code() -> None:
    failing = COMMAND.replace("return 1", "raise OSError('no')")
    with FULL_DISK.open("wb") as full:
        assert subprocess.run([sys.executable, "-c", failing, "0"], stderr=full, check=False).returncode == 2


@buffering
@pytest.mark.parametrize("module", ["gircse.runtime.embed_command", "gircse.evaluation.parity_command"])
def test_help_into_a_closed_pipe_is_quiet(module: str, unbuffered: str) -> None:
    assert into_closed_pipe("-m", module, "--help", unbuffered=unbuffered)[1] == b""


def write_lines(path: Path, count: int) -> Path:
    path.write_text("".join(f"text number {number}\n" for number in range(count)))
    return path


def embed(bundle: Path, *arguments: str) -> list[str]:
    return ["-m", "gircse.runtime.embed_command", str(bundle), "--threads", "1", *arguments]


@buffering
def test_embed_stops_quietly_after_the_first_line(small_models: SmallModels, tmp_path: Path, unbuffered: str) -> None:
    texts = write_lines(tmp_path / "texts.txt", 5000)
    command = embed(small_models.bundle("qwen2"), "--input", str(texts))
    with start(*command, stdout=subprocess.PIPE, unbuffered=unbuffered) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b'{"text": "text number 0", "embedding": [')
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == PIPE_CLOSED


@needs_full_disk
@pytest.mark.parametrize("arguments", [[], ["--self-test"]])
def test_embed_onto_a_full_disk(small_models: SmallModels, tmp_path: Path, arguments: list[str]) -> None:
    texts = write_lines(tmp_path / "texts.txt", 2000)
    command = embed(small_models.bundle("qwen2"), "--input", str(texts), *arguments)
    wanted = b"gircse-embed: error: stdout cannot be written: No space left on device. Check the free space.\n"
    assert onto_full_disk(*command) == (2, wanted)


@pytest.mark.parametrize("name", ["x.npy", "x.jsonl"])
def test_embed_into_a_file_that_grows_too_large(small_models: SmallModels, tmp_path: Path, name: str) -> None:
    texts, folder = write_lines(tmp_path / "texts.txt", 1000), tmp_path / "output"
    folder.mkdir()

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = embed(small_models.bundle("qwen2"), "--input", str(texts), "--output", str(folder / name))
    process = start(*command, stdout=subprocess.PIPE, preexec_fn=limit_files)
    stdout, stderr = process.communicate()
    wanted = f"gircse-embed: error: --output {folder / name} cannot be written: File too large. Check"
    assert (process.returncode, stdout) == (2, b"")
    assert stderr.decode().startswith(wanted)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("closed", "stream"), [(0, "stdin"), (1, "stdout")])
def test_embed_with_a_stream_that_the_shell_has_closed(
    small_models: SmallModels, tmp_path: Path, closed: int, stream: str
) -> None:
    arguments = [] if stream == "stdin" else ["--input", str(write_lines(tmp_path / "texts.txt", 1))]
    command = embed(small_models.bundle("qwen2"), *arguments)
    process = start(*command, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(closed))
    _, stderr = process.communicate()
    assert process.returncode == 2
    assert stderr.decode().startswith(f"gircse-embed: error: {stream} is closed. Redirect ")


def test_progress_that_nobody_reads_does_not_stop_the_work() -> None:
    work = """
import sys
from gircse.reporting.progress import StageProgress
progress = StageProgress()
for number in range(3):
    with progress.stage("work"):
        pass
print("done")
"""
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run([sys.executable, "-c", work], stdout=subprocess.PIPE, stderr=writing, check=False)
    os.close(writing)
    assert (process.returncode, process.stdout) == (0, b"done\n")


def test_a_missing_package_is_not_any_import_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A library raises ImportError for an option of its own too, such as an attention that it lacks."""

    def missing() -> int:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    def lacking() -> int:
        raise ImportError("FlashAttention2 has been toggled on, but flash_attn is not there")

    assert run_command("gircse-test", missing, extras="export") == 2
    expected = "gircse-test: error: torch is not installed. Install it: pip install 'gircse-deploy[export]'\n"
    assert capsys.readouterr().err == expected
    assert run_command("gircse-test", lacking, extras="export") == 2
    said = capsys.readouterr().err
    assert said.startswith("gircse-test: error: a package cannot be used: FlashAttention2 has been toggled on")
    assert "not installed" not in said
