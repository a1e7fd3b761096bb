"""Runs a command and measures it: wall time, and the most memory that it and its children held together."""

import contextlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

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
        output: the end of what it printed on both streams.
    """

    exit_code: int
    seconds: float
    peak_memory: int
    peak_anonymous: int
    output: str


def measure(argv: Sequence[str]) -> Measurement:
    """Run a command to its end. What it prints is passed on afterwards, not while it runs."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        sampler = _Sampler(process.pid)
        try:
            with sampler:
                exit_code = process.wait()
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - start
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Measurement(exit_code, seconds, sampler.peak, sampler.peak_anonymous, text[-OUTPUT_CHARACTERS:])


class _Sampler:
    """Looks at a process and its children from a thread, until the block ends."""

    def __init__(self, pid: int) -> None:
        self.peak = self.peak_anonymous = 0
        self._pid = pid
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
                self.peak = max(self.peak, sum(pss for pss, _ in held))
                self.peak_anonymous = max(self.peak_anonymous, sum(anonymous for _, anonymous in held))


def _held(process: psutil.Process) -> tuple[int, int]:
    """Return proportional and anonymous memory of a process; where the system has no such numbers, the resident set."""
    try:
        memory = process.memory_full_info()
        return getattr(memory, "pss", memory.rss), memory.rss - getattr(memory, "shared", 0)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0, 0
