"""``gircse-embed``: from lines of text to vectors."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gircse.runtime.atomic_file import atomic_write
from gircse.runtime.command import add_runtime_flags
from gircse.runtime.embedder import DEFAULT_BATCH_SIZE, DEFAULT_BATCH_TOKENS, Embedder
from gircse.runtime.errors import GircseError
from gircse.runtime.numerics import Float32
from gircse.runtime.provider import Provider
from gircse.runtime.text_files import decode_lines, read_lines
from gircse.runtime.tokenization import Overflow


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 1 for a failed self-test, 2 for an error."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="gircse-embed: %(message)s")
    try:
        if args.output is not None:
            _check_output(args.output)
        embedder = Embedder(
            args.bundle,
            precision=args.precision,
            provider=args.provider,
            layout=args.layout,
            threads=args.threads,
            verify=not args.no_verify,
        )
        if args.self_test:
            return _self_test(embedder)
        lines = decode_lines(sys.stdin.buffer, "stdin") if args.input == "-" else read_lines(Path(args.input))
        texts = [line.text for line in lines]  # a blank line is an empty text: output row i is input line i + 1
        vectors = embedder.encode(
            texts,
            instruction=args.instruction,
            steps=args.steps,
            batch_size=args.batch_size,
            batch_tokens=args.batch_tokens,
            on_overflow=args.on_overflow,
            show_progress=sys.stderr.isatty(),
        )
        _write(args.output, texts, vectors)
    except (GircseError, ValueError, OSError) as err:
        print(f"gircse-embed: error: {err}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gircse-embed", description="Embed one text a line with a bundle.")
    parser.add_argument("bundle", type=Path, help="bundle directory")
    parser.add_argument(
        "--input", default="-", metavar="FILE", help="UTF-8, one text a line; .gz is unpacked; - is stdin (default)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="x.npy or x.jsonl (default: JSON lines on stdout)")
    parser.add_argument("--instruction", default="", help="put before every text; leave out for documents")
    parser.add_argument("--steps", type=int, metavar="k", help="refinement steps, 0 to K (default: K)")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=DEFAULT_BATCH_SIZE,
        metavar="N",
        help=f"most texts of a batch (default: {DEFAULT_BATCH_SIZE})",
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=DEFAULT_BATCH_TOKENS,
        metavar="N",
        help=f"most tokens of a batch, padding included (default: {DEFAULT_BATCH_TOKENS})",
    )
    parser.add_argument("--precision", help="variant of the bundle (default: FP32 on the CPU, FP16 on a GPU)")
    add_runtime_flags(parser, default=Provider.AUTO)
    parser.add_argument("--threads", type=int, metavar="T", help="threads (default: every physical core)")
    parser.add_argument(
        "--on-overflow",
        type=Overflow,
        choices=list(Overflow),
        default=Overflow.TRUNCATE,
        metavar="truncate|error",
        help="what to do with texts that are too long (default: truncate, and say how many)",
    )
    parser.add_argument("--no-verify", action="store_true", help="skip the hashes of the bundle's files")
    parser.add_argument("--self-test", action="store_true", help="compare with the golden vectors instead of embedding")
    return parser


def _check_output(path: Path) -> None:
    """Refuse an output that could not be written, before the work and not after it."""
    if path.suffix not in (".npy", ".jsonl"):
        raise ValueError(f"--output {path}: ends in {path.suffix!r} | .npy or .jsonl | rename it")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: no directory {path.parent} | an existing directory | make it first")


def _write(output: Path | None, texts: Sequence[str], vectors: Float32) -> None:
    """Write the vectors; a file appears whole or not at all."""
    if output is None:
        sys.stdout.writelines(_json_lines(texts, vectors))
        return
    with atomic_write(output) as file:
        if output.suffix == ".npy":
            np.save(file, vectors)
        else:
            file.writelines(line.encode("utf-8") for line in _json_lines(texts, vectors))
    print(output)


def _json_lines(texts: Sequence[str], vectors: Float32) -> list[str]:
    return [
        json.dumps({"text": text, "embedding": vector.tolist()}, ensure_ascii=False) + "\n"
        for text, vector in zip(texts, vectors, strict=True)
    ]


def _self_test(embedder: Embedder) -> int:
    report = embedder.self_test()
    verdict = "passed" if report.passed else "FAILED"
    print(
        f"self-test {verdict}: {embedder.precision} on {embedder.provider}, {report.texts} texts, smallest cosine to PyTorch {report.min_cosine:.7f}, "
        f"largest difference {report.max_difference:.1e}"
    )
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
