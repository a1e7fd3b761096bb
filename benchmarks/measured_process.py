"""Runs a command and measures it: wall time, the most memory of it and its children together, the most disk."""

import contextlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.25
OUTPUT_CHARACTERS = 20_000


@dataclass(frozen=True)
class Measurement:
    """What a command did and took.

    Attributes:
        exit_code: its exit code.
        seconds: wall time.
        peak_memory: bytes. The largest sum of the proportional set sizes of the command and all its children, sampled
            four times a second: pages that several processes share count once, mapped files count where they are in
            memory.
        peak_anonymous: bytes of the same that no file backs, which the system cannot drop.
        peak_disk: bytes by which the files in the directory grew at most, sampled too.
        output: the end of what it printed on both streams.
    """

    exit_code: int
    seconds: float
    peak_memory: int
    peak_anonymous: int
    peak_disk: int
    output: str


def measure(argv: Sequence[str], directory: Path) -> Measurement:
    """Run a command to its end; ``directory`` is where it writes."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        sampler = _Sampler(process.pid, directory)
        try:
            with sampler:
                exit_code = process.wait()
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - start
        output.seek(0)
        text = output.read().decode(errors="replace")
    peaks = sampler.peak_memory, sampler.peak_anonymous, sampler.peak_disk
    return Measurement(exit_code, seconds, *peaks, text[-OUTPUT_CHARACTERS:])


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a directory; those that vanish meanwhile do not count."""
    size = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with contextlib.suppress(FileNotFoundError):
            size += file.stat().st_size if file.is_file() else 0
    return size


class _Sampler:
    """Looks at a process and its children from a thread, until the block ends."""

    def __init__(self, pid: int, directory: Path) -> None:
        self.peak_memory = self.peak_anonymous = self.peak_disk = 0
        self._pid, self._directory, self._before = pid, directory, size_of(directory)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(self._pid)
                held = [_held(each) for each in (process, *process.children(recursive=True))]
                self.peak_memory = max(self.peak_memory, sum(pss for pss, _ in held))
                self.peak_anonymous = max(self.peak_anonymous, sum(anonymous for _, anonymous in held))
            self.peak_disk = max(self.peak_disk, size_of(self._directory) - self._before)


def _held(process: psutil.Process) -> tuple[int, int]:
    """Return proportional and anonymous memory of a process; where the system has no such numbers, the resident set."""
    try:
        memory = process.memory_full_info()
        return getattr(memory, "pss", memory.rss), memory.rss - getattr(memory, "shared", 0)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0, 0
