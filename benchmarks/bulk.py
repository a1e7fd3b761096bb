"""What streams and workers on Ray gain over one process, and what runs leave that are killed.

    python benchmarks/bulk.py gircse-demo-int8 --precision int8 --output bulk.json
    python benchmarks/bulk.py gircse-demo-int8 --precision int8 --only ends --texts 3000

``gircse-bulk`` runs as a process; times are those of the whole command, the start of Python, of Ray and of the bundle
included. One process with two threads, one with two streams, and two workers with one thread each take turns, on the
same texts and cores.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow.dataset
from serve import text_of

WORDS = range(2, 30)
"""Words of a text."""


def write_texts(path: Path, count: int) -> None:
    """Write JSON Lines of texts of mixed lengths."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = text_of(WORDS[number * 7919 % len(WORDS)], number)
            file.write(json.dumps({"id": number, "text": text}) + "\n")


def read_vectors(output: Path, count: int) -> np.ndarray:
    """Return the vectors (count, hidden) float32; every id has to stand there exactly once."""
    table = pyarrow.dataset.dataset(output / "vectors").to_table().sort_by("id")
    if table["id"].to_pylist() != list(range(count)):
        raise SystemExit(f"{output}: the ids are not 0 to {count - 1}, each once")
    vectors: np.ndarray = np.stack(table["vector"].combine_chunks().to_numpy(zero_copy_only=False))
    return vectors


class Share(NamedTuple):
    """Who does the work."""

    workers: int = 1
    threads: int = 2
    streams: int = 1


SHARES = {"process": Share(), "streams": Share(threads=1, streams=2), "workers": Share(workers=2, threads=1)}


class Job:
    """A job whose runs differ in who does the work."""

    def __init__(self, bundle: str, precision: str, texts: Path) -> None:
        self._fixed = [sys.executable, "-m", "gircse.serving.bulk.bulk_command", bundle, str(texts)]
        self._fixed += ["--precision", precision, "--provider", "cpu"]

    def command(self, output: Path, share: Share) -> list[str]:
        """Return the command of a run."""
        flags = (flag for name, number in share._asdict().items() for flag in (f"--{name}", str(number)))
        return [*self._fixed, "--output", str(output), *flags]

    def run(self, output: Path, share: Share) -> float:
        """Do a run to its end; returns its seconds."""
        begun = time.perf_counter()
        subprocess.run(self.command(output, share), check=True)
        return time.perf_counter() - begun

    @contextmanager
    def running(self, output: Path, share: Share) -> Iterator[psutil.Process]:
        """Start a run and wait until it has written something; yields its process."""
        with subprocess.Popen(self.command(output, share)) as process:
            while not any((output / "vectors").glob("*.parquet")):
                if process.poll() is not None:
                    raise SystemExit("the run ended before it was disturbed")
                time.sleep(0.1)
            yield psutil.Process(process.pid)
            process.wait()


def measure_speed(job: Job, folder: Path, count: int, *, rounds: int) -> dict[str, Any]:
    """Compare one process of two threads with two streams and with two workers."""
    seconds: dict[str, list[float]] = {name: [] for name in SHARES}
    vectors = {}
    for number in range(rounds):
        for name, share in SHARES.items():
            output = folder / f"{name}-{number}"
            seconds[name].append(job.run(output, share))
            vectors[name] = read_vectors(output, count)
            print(f"{name}: {seconds[name][-1]:.1f} s, {count / seconds[name][-1]:.1f} texts/s", flush=True)
    ratios = {name: min(seconds["process"]) / min(seconds[name]) for name in SHARES}
    differences = {name: float(np.abs(vectors["process"] - vectors[name]).max()) for name in SHARES}
    for name in ("streams", "workers"):
        print(f"{name} against one process: {ratios[name]:.3f}; largest difference {differences[name]:.1e}")
    return {"texts": count, "seconds": seconds, "ratios": ratios, "largest_differences": differences}


def measure_ends(job: Job, folder: Path, count: int) -> dict[str, Any]:
    """Kill a worker, and the driver of workers and of one process; each time the vectors have to come out the same."""
    reference = folder / "reference"
    job.run(reference, Share(threads=1))
    wanted = read_vectors(reference, count)

    def kill_worker(driver: psutil.Process) -> None:
        next(child for child in driver.children(recursive=True) if "ray::Worker" in "".join(child.cmdline())).kill()

    def kill_driver(driver: psutil.Process) -> None:
        os.kill(driver.pid, signal.SIGKILL)

    found = {}
    ends: dict[str, tuple[int, Callable[[psutil.Process], None]]] = {
        "worker": (2, kill_worker),
        "driver of workers": (2, kill_driver),
        "process": (1, kill_driver),
    }
    for name, (workers, kill) in ends.items():
        output, share = folder / name.replace(" ", "-"), Share(workers, threads=1)
        with job.running(output, share) as driver:
            kill(driver)
        left = len(list((output / "vectors").glob("*.parquet")))
        job.run(output, share)
        found[name] = float(np.abs(read_vectors(output, count) - wanted).max())
        print(f"{name} killed: {left} fragments were there after it; largest difference at last {found[name]:.1e}")
    return {"texts": count, "largest_difference": found}


def main() -> int:
    """Measure, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--texts", type=int, default=20_000, metavar="N")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="of all, in turn")
    parser.add_argument("--only", choices=("speed", "ends"))
    parser.add_argument("--output", type=Path, metavar="FILE")
    args = parser.parse_args()
    found: dict[str, Any] = {"bundle": args.bundle, "precision": args.precision}
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.jsonl"
        write_texts(texts, args.texts)
        job = Job(args.bundle, args.precision, texts)
        if args.only != "ends":
            found["speed"] = measure_speed(job, Path(folder), args.texts, rounds=args.rounds)
        if args.only != "speed":
            found["ends"] = measure_ends(job, Path(folder), args.texts)
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
