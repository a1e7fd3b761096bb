"""Compare the C++ tokenizer with Hugging Face tokenizers: ids, speed, load.

python benchmarks/cpp_tokenizer.py --program BUILD/tests/tokenize_texts [--every-code-point] TOKENIZER_JSON...

Ids: of the corpus of tests/support/tokenizer_corpus.py, and of every code point in a frame. Speed: on one thread, of
the corpus and of the lines of docs/; each round opens both anew in processes of their own, one after the other, and
Hugging Face counts with the better of two passes, the second of which finds words in its cache. Prints tables in
Markdown; exits with 1 if an id differs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from support.cpp_tokenizer import CppTokenizer, run_program
from support.tokenizer_corpus import tokenizer_corpus

FRAME = "a{0}b 1{0}2 {0}{0} '{0}e{0}\u0301\n{0}"
CODE_POINTS = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
AT_ONCE = 100_000

HUGGING_FACE = """
import json, sys, time
from tokenizers import Tokenizer
clock = time.perf_counter
texts = json.load(sys.stdin)
start = clock()
tokenizer = Tokenizer.from_file(sys.argv[1])
loaded = clock()
tokenizer.no_truncation()
tokenizer.no_padding()
passes = []
for _ in range(2):
    before = clock()
    tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    passes.append(clock() - before)
print(json.dumps({"load": loaded - start, "encode": min(passes)}))
"""


@dataclass(frozen=True)
class Seconds:
    """Medians of one tokenizer.

    Attributes:
        load: to open it.
        encode: to tokenize all texts.
    """

    load: float
    encode: float


def main() -> int:
    """Print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="+", type=Path, metavar="TOKENIZER_JSON")
    parser.add_argument("--program", required=True, type=Path, help="tokenize_texts of the C++ tests")
    parser.add_argument("--every-code-point", action="store_true", help="minutes for each tokenizer")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of the timing (default: 5)")
    args = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    print(f"tokenizers {version('tokenizers')}\n")
    differing = sum(_compare(path, args.program, every=args.every_code_point) for path in args.tokenizers)
    _time(args.tokenizers, args.program, args.rounds)
    return int(differing > 0)


def _name(path: Path) -> str:
    parents = [part for part in path.parts[:-1] if part not in ("package", "models")]
    return parents[-1] if parents else path.name


def _compare(path: Path, program: Path, *, every: bool) -> int:
    """Print how many ids differ, and the first texts; returns the number."""
    added = [token.content for token in Tokenizer.from_file(str(path)).get_added_tokens_decoder().values()]
    corpus = tokenizer_corpus(added[:50])
    found = list(_differences(path, program, corpus))
    print(f"{_name(path)}: {len(found)} of {len(corpus)} strings differ", flush=True)
    if every:
        framed = [FRAME.format(char) for char in CODE_POINTS]
        points = [
            text
            for at in range(0, len(framed), AT_ONCE)
            for text in _differences(path, program, framed[at : at + AT_ONCE])
        ]
        print(f"{_name(path)}: {len(points)} of {len(framed)} code points differ", flush=True)
        found += points
    for text in found[:5]:
        print(f"    {text!r}")
    return len(found)


def _differences(path: Path, program: Path, texts: Sequence[str]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        document = json.loads(path.read_text(encoding="utf-8")) | {"truncation": None, "padding": None}
        yield from (text for text, _, _ in CppTokenizer(program, Path(directory)).differences(document, texts))


def _time(paths: Sequence[Path], program: Path, rounds: int) -> None:
    prose = [line for path in sorted((ROOT / "docs").glob("*.md")) for line in path.read_text("utf-8").splitlines()]
    texts = {"corpus": tokenizer_corpus(), "prose": prose}
    sizes = ", ".join(f"{name} {sum(len(text.encode()) for text in them)} bytes" for name, them in texts.items())
    print(f"\nMedians of {rounds} rounds, ms; {sizes}\n")
    print("| tokenizer | load | Hugging Face | ratio | corpus | Hugging Face | ratio | prose | Hugging Face | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for path in paths:
        cells, loads = [], []
        for them in texts.values():
            ours, theirs = _seconds(path, program, them, rounds)
            loads.append((ours.load, theirs.load))
            cells += _cells(ours.encode, theirs.encode)
        print(f"| {' | '.join([_name(path), *_cells(*map(min, zip(*loads, strict=True))), *cells])} |", flush=True)


def _cells(ours: float, theirs: float) -> list[str]:
    return [f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}", f"{theirs / ours:.1f}x"]


def _seconds(path: Path, program: Path, texts: Sequence[str], rounds: int) -> tuple[Seconds, Seconds]:
    """Time both in turn: ours, and Hugging Face."""
    encoded, listed = [text.encode() for text in texts], json.dumps(list(texts))
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(run_program(program, path, encoded)[1])
        command = [sys.executable, "-c", HUGGING_FACE, str(path)]
        done = subprocess.run(command, input=listed, stdout=subprocess.PIPE, check=True, text=True)
        theirs.append(json.loads(done.stdout))
    mine, yours = (
        Seconds(*(statistics.median(run[name] for run in runs) for name in ("load", "encode")))
        for runs in (ours, theirs)
    )
    return mine, yours


if __name__ == "__main__":
    sys.exit(main())
