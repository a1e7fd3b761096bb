"""Compare the C++ runtime with Python's: latency, throughput, opening, memory, size.

    python benchmarks/cpp_runtime.py gircse-demo-int8 --build BUILD [--layout unrolled] [--precision fp32,int8]

BUILD is the build folder of runtime/cpp (release). Texts run in one process, both runtimes on one ONNX Runtime file,
on the same threads, warmed up alike and in turn, each round in the other order. Bundles are opened in fresh processes,
in turn, after both libraries were loaded and every file was read once. Peak memory is that of the two commands with
one text. Prints a table in Markdown.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from gircse.runtime import Embedder
from gircse.runtime.command import comma_separated

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from support.cpp_library import CppLibrary

WARM_UP = 2
TOKENS = 24
BATCH = 32
LATENCY_TARGET, THROUGHPUT_TARGET, OPEN_TARGET, MEMORY_TARGET, MAX_LIBRARY_BYTES = 1.05, 1.03, 1.25, 1.0, 1_000_000

OPEN_PYTHON = """
import sys, time
import onnxruntime
from gircse.runtime import Embedder
bundle, precision, layout, threads, verify = sys.argv[1:6]
start = time.perf_counter()
Embedder(bundle, precision=precision, layout=layout, threads=int(threads), verify=verify == "True", provider="cpu")
print(time.perf_counter() - start)
"""
OPEN_CPP = """
import ctypes, sys, time
from pathlib import Path
from support.cpp_library import CppLibrary
bundle, precision, layout, threads, verify, library, onnxruntime = sys.argv[1:]
ctypes.CDLL(onnxruntime)
loaded = CppLibrary(Path(library), Path(onnxruntime))
options = {"precision": precision, "layout": layout, "threads": int(threads), "verify": int(verify == "True")}
start = time.perf_counter()
loaded.open(bundle, provider="cpu", **options)
print(time.perf_counter() - start)
"""

PEAK_MEMORY = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""Linux counts the memory of the parent at the start of a child, so the parent has to be small."""


@dataclass(frozen=True)
class Machine:
    """What is compared, and where it is."""

    bundle: Path
    library: Path
    command: Path
    onnxruntime: Path
    layout: str
    threads: int
    repeats: int


def main() -> None:
    """Measure everything and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--build", type=Path, required=True, help="build folder of runtime/cpp")
    parser.add_argument("--precision", type=comma_separated(str), default=("fp32", "int8"))
    parser.add_argument("--layout", default="stepwise")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    command = args.build / "command" / "gircse-embed-cpp"
    machine = Machine(
        args.bundle, args.build / "libgircse.so", command, library, args.layout, args.threads, args.repeats
    )
    print(f"onnxruntime {onnxruntime.__version__}, {args.threads} threads, {args.layout}; median (minimum)\n")
    print("| what | Python | C++ | C++ / Python, medians | minima | target |\n|---|---|---|---|---|---|")
    for precision in args.precision:
        print_speed(machine, precision)
        for verify in (True, False):
            print_open(machine, precision, verify=verify)
        print_memory(machine, precision)
    print_size(machine.library)


def print_speed(machine: Machine, precision: str) -> None:
    """Time one text and a batch of texts, both runtimes in turn."""
    with (
        Embedder(
            machine.bundle, precision=precision, layout=machine.layout, threads=machine.threads, provider="cpu"
        ) as python,
        CppLibrary(machine.library, machine.onnxruntime).open(
            machine.bundle, precision=precision, layout=machine.layout, threads=machine.threads, provider="cpu"
        ) as cpp,
    ):
        text = text_of(TOKENS, lambda found: len(python.tokenizer([found])[0]))
        for texts, target in (([text], LATENCY_TARGET), ([text] * BATCH, THROUGHPUT_TARGET)):
            np.testing.assert_array_equal(cpp.encode(texts), python.encode(texts))
            seconds = in_turn(
                lambda texts=texts: timed(lambda: python.encode(texts)),
                lambda texts=texts: timed(lambda: cpp.encode(texts)),
                machine.repeats,
            )
            print_row(f"{precision}, {len(texts)} x {TOKENS} tokens, ms", seconds, target, scale=1000)


def print_open(machine: Machine, precision: str, *, verify: bool) -> None:
    """Time how long a bundle takes to open, each time in a new process."""
    arguments = [machine.bundle, precision, machine.layout, str(machine.threads), str(verify)]
    environment = {"PYTHONPATH": str(ROOT / "tests")}
    seconds = in_turn(
        lambda: float(output_of(sys.executable, "-c", OPEN_PYTHON, *arguments)),
        lambda: float(
            output_of(
                *(sys.executable, "-c", OPEN_CPP, *arguments, machine.library, machine.onnxruntime), **environment
            )
        ),
        max(machine.repeats // 2, 3),
    )
    print_row(f"{precision}, open{', with hashes' if verify else ''}, s", seconds, OPEN_TARGET)


def print_memory(machine: Machine, precision: str) -> None:
    """Measure the peak memory of the two commands with one text."""
    flags = ["--precision", precision, "--layout", machine.layout, "--threads", str(machine.threads)]
    with tempfile.TemporaryDirectory() as scratch:
        texts = Path(scratch) / "text.txt"
        texts.write_text("How do I reset my PIN?\n", encoding="utf-8")
        flags += ["--input", str(texts), "--output", str(Path(scratch) / "vectors.npy"), "--provider", "cpu"]
        python = Path(sys.executable).parent / "gircse-embed"
        kilobytes = in_turn(
            lambda: peak_kilobytes(python, machine.bundle, *flags),
            lambda: peak_kilobytes(machine.command, machine.bundle, *flags, "--onnxruntime", str(machine.onnxruntime)),
            3,
        )
    print_row(f"{precision}, peak resident memory, MB", kilobytes, MEMORY_TARGET, scale=1 / 1000)


def print_size(library: Path) -> None:
    """Print the size of the library without its symbol table."""
    with tempfile.TemporaryDirectory() as scratch:
        stripped = Path(scratch) / "stripped.so"
        subprocess.run(["strip", "-o", stripped, library], check=True)
        size = stripped.stat().st_size
    print(f"| stripped library, bytes | | {size:,} | | | {MAX_LIBRARY_BYTES:,} |")


def in_turn(python: Callable[[], float], cpp: Callable[[], float], repeats: int) -> tuple[list[float], list[float]]:
    """Run two measurements in turn, in changing order, and return both without the first rounds."""
    found: tuple[list[float], list[float]] = ([], [])
    for round_number in range(repeats + WARM_UP):
        pairs = [(found[0], python), (found[1], cpp)]
        for values, measure in pairs if round_number % 2 else reversed(pairs):
            values.append(measure())
    return found[0][WARM_UP:], found[1][WARM_UP:]


def print_row(name: str, found: tuple[Iterable[float], Iterable[float]], target: float, *, scale: float = 1) -> None:
    """Print medians, minima and their ratios."""
    (python, cpp), (python_least, cpp_least) = map(statistics.median, found), map(min, found)
    cells = [
        f"{middle * scale:.4g} ({least * scale:.4g})" for middle, least in ((python, python_least), (cpp, cpp_least))
    ]
    ratios = f"{cpp / python:.3f} | {cpp_least / python_least:.3f}"
    print(f"| {name} | {cells[0]} | {cells[1]} | {ratios} | {target} |", flush=True)


def text_of(tokens: int, count: Callable[[str], int]) -> str:
    """Return a text of so many tokens: words of the README."""
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    for start in range(len(words)):
        for end in range(start + 1, start + 1 + tokens):
            if count(text := " ".join(words[start:end])) == tokens:
                return text
    raise ValueError(f"no {tokens} tokens end with a word")


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def output_of(*command: str | Path, **environment: str) -> str:
    """Return what a program prints."""
    return subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def peak_kilobytes(*command: str | Path) -> float:
    """Return the peak resident memory of a program."""
    return float(output_of(sys.executable, "-c", PEAK_MEMORY, *command))


if __name__ == "__main__":
    main()
