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
COUNTING_SHARE = 0.02
"""Most of the time that may go into counting mapped pages: a process with a 15 GB file mapped has four million."""

OUTPUT_CHARACTERS = 20_000


@dataclass(frozen=True)
class Measurement:
    """What a command did and took.

    Attributes:
        exit_code: its exit code.
        seconds: wall time.
        peak_memory: bytes. The largest sum of the proportional set sizes of the command and all its children: pages
            that several processes share count once, mapped files count where they are in memory. Sampled four times a
            second, more rarely where counting takes long.
        peak_anonymous: bytes of the same that no file backs, which the system cannot drop. Four times a second.
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
    # The anonymous pages are part of the others, and are looked at more often.
    peaks = max(sampler.peak_memory, sampler.peak_anonymous), sampler.peak_anonymous, sampler.peak_disk
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
        count_after = 0.0
        while not self._ended.wait(SAMPLE_SECONDS):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(self._pid)
                family = (process, *process.children(recursive=True))
                self.peak_anonymous = max(self.peak_anonymous, sum(map(_anonymous, family)))
                if (start := time.perf_counter()) >= count_after:
                    self.peak_memory = max(self.peak_memory, sum(map(_proportional, family)))
                    end = time.perf_counter()
                    count_after = end + (end - start) / COUNTING_SHARE
            self.peak_disk = max(self.peak_disk, size_of(self._directory) - self._before)


def _anonymous(process: psutil.Process) -> int:
    """Return the memory of a process that no file backs; where the system has no such number, the resident set."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        memory = process.memory_info()
        return int(memory.rss - getattr(memory, "shared", 0))
    return 0


def _proportional(process: psutil.Process) -> int:
    """Return the proportional set size of a process; where the system has no such number, the resident set."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        memory = process.memory_full_info()
        return int(getattr(memory, "pss", memory.rss))
    return 0
