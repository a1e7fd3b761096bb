"""``gircse-embed``: from lines of text to vectors, read and written as it goes."""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from gircse.runtime.atomic_file import atomic_write
from gircse.runtime.command import (
    add_batch_flags,
    add_open_flags,
    open_arguments,
    parse_arguments,
    run_command,
    write_stdout,
)
from gircse.runtime.embedder import Embedder
from gircse.runtime.errors import OptionError, OutputError
from gircse.runtime.numerics import Float32
from gircse.runtime.provider import Provider
from gircse.runtime.text_files import read_lines, read_stdin
from gircse.runtime.tokenization import Overflow
from gircse.runtime.vector_files import json_lines, write_npy


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = argparse.ArgumentParser(prog="gircse-embed", description="Embed texts, one per line, with a bundle.")
    parser.add_argument("bundle", type=Path, help="bundle directory")
    parser.add_argument(
        "--input",
        default="-",
        metavar="FILE",
        help="UTF-8, one text per line; .gz is unpacked; - is stdin (default)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="x.npy or x.jsonl (default: JSON lines on stdout)")
    parser.add_argument("--instruction", default="", help="put before every text; leave it out for documents")
    parser.add_argument("--steps", type=int, metavar="k", help="refinement steps, 0 to K (default: K)")
    add_batch_flags(parser)
    add_open_flags(parser, default=Provider.AUTO)
    parser.add_argument(
        "--on-overflow",
        type=Overflow,
        choices=list(Overflow),
        default=Overflow.TRUNCATE,
        metavar="truncate|error",
        help="what to do with texts that are too long (default: truncate, and say how many)",
    )
    parser.add_argument("--self-test", action="store_true", help="compare with the golden vectors instead of embedding")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 1 for a failed self-test, 2 for an error."""
    args = parse_arguments(build_parser(), argv)
    return run_command("gircse-embed", lambda: _run(args), extras="cpu")


def _run(args: argparse.Namespace) -> int:
    if args.output is not None:
        _check_output(args.output)
    with Embedder(args.bundle, **open_arguments(args)) as embedder:
        if args.self_test:
            return _self_test(embedder)
        windows = _embedded_windows(embedder, args)
        if args.output is None:
            for texts, vectors in windows:
                write_stdout(json_lines(texts, vectors))
        else:
            _write_file(args.output, windows, dimension=embedder.embedding_dimension)
            print(args.output)
    return 0


def _check_output(path: Path) -> None:
    """Refuse an output that could not be written, before the work and not after it."""
    if path.suffix not in (".npy", ".jsonl"):
        raise OptionError(f"--output {path}", f"ends in {path.suffix!r}", "it has to end in .npy or .jsonl")
    if not path.parent.is_dir():
        raise OutputError(
            f"--output {path}", "cannot be written", f"there is no directory {path.parent}", "Create it first."
        )


def _embedded_windows(embedder: Embedder, args: argparse.Namespace) -> Iterator[tuple[list[str], Float32]]:
    """Yield some texts and their vectors at a time; a blank line is an empty text, so row i is line i + 1."""
    lines = read_stdin() if args.input == "-" else read_lines(Path(args.input))
    embedded, written = itertools.tee(line.text for line in lines)
    for vectors in embedder.encode_iter(
        embedded,
        instruction=args.instruction,
        steps=args.steps,
        batch_size=args.batch_size,
        batch_tokens=args.batch_tokens,
        on_overflow=args.on_overflow,
        show_progress=sys.stderr.isatty(),
    ):
        yield list(itertools.islice(written, len(vectors))), vectors


def _write_file(path: Path, windows: Iterator[tuple[list[str], Float32]], *, dimension: int) -> None:
    """Write the vectors atomically."""
    try:
        with atomic_write(path) as file:
            if path.suffix == ".npy":
                write_npy(file, (vectors for _, vectors in windows), dimension=dimension)
            else:
                for texts, vectors in windows:
                    file.writelines(line.encode("utf-8") for line in json_lines(texts, vectors))
    except OSError as err:  # of the output: the reader of the input has errors of its own
        raise OutputError(
            f"--output {path}",
            f"cannot be written: {err.strerror or err}",
            None,
            "Check its directory and the free space.",
        ) from err


def _self_test(embedder: Embedder) -> int:
    report = embedder.self_test()
    verdict = "passed" if report.passed else "FAILED"
    print(
        f"self-test {verdict}: {embedder.precision} on {embedder.provider}, {report.texts} texts, "
        f"smallest cosine to PyTorch {report.min_cosine:.7f}, largest difference {report.max_difference:.1e}"
    )
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
