"""``gircse-parity``: are these the vectors of the reference?"""

import argparse
import logging
import sys
from dataclasses import fields
from pathlib import Path

from gircse.evaluation.task_flags import add_task_flags, pop_task_options, show_tables
from gircse.runtime.command import add_runtime_flags
from gircse.runtime.errors import GircseError
from gircse.runtime.provider import Provider

EXTRAS = "pip install 'gircse-deploy[cpu,evaluation]', and [export,demo] for the PyTorch reference"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 passed, 1 a gate failed, 2 could not measure."""
    args = vars(_parser().parse_args(argv))
    logging.basicConfig(level=logging.WARNING, format="gircse-parity: %(message)s")
    report_directory: Path | None = args.pop("report")
    try:
        # Here, not above: scipy and matplotlib take seconds to import, and --help should not.
        from gircse.evaluation.parity.report_text import terminal_tables
        from gircse.evaluation.parity.run import ParityOptions, measure_parity
        from gircse.evaluation.write_reports import write_parity_report
        from gircse.reporting.files import open_report_directory
        from gircse.runtime.precision import ParityLimits

        chosen = {field.name: args.pop(field.name) for field in fields(ParityLimits)}
        limits = {name: limit for name, limit in chosen.items() if limit is not None}
        tasks = pop_task_options(args)
        open_report_directory(report_directory)
        result = measure_parity(ParityOptions(**args, limits=limits, tasks=tasks))
        written = write_parity_report(result, report_directory) if report_directory else []
    except (GircseError, ValueError, OSError) as err:
        print(f"gircse-parity: error: {err}", file=sys.stderr)
        return 2
    except ImportError as err:
        print(
            f"gircse-parity: error: {err.name or err} is not installed | the evaluation packages | {EXTRAS}",
            file=sys.stderr,
        )
        return 2
    show_tables(terminal_tables(result.report), width=120)
    for path in written:
        print(path)
    return 0 if result.report.passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gircse-parity",
        description="Compare a bundle with PyTorch or with another bundle, step by step, and evaluate_gates it by gates.",
        epilog="exit code: 0 every gate passed, 1 a gate failed, 2 could not measure",
    )
    parser.add_argument("bundle", type=Path, help="bundle directory")
    parser.add_argument(
        "--precision",
        dest="precisions",
        nargs="+",
        default=(),
        metavar="P",
        help="variants to evaluate_gates (default: every one but the reference)",
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write parity.json, .md, .xml and charts there")
    _add_reference_flags(parser)
    _add_data_flags(parser)
    _add_gate_flags(parser)
    add_runtime_flags(parser, default=Provider.CPU)
    parser.add_argument("--threads", type=int, metavar="T", help="threads of both sides (default: left to each)")
    return parser


def _add_reference_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reference")
    group.add_argument(
        "--reference",
        default="torch",
        metavar="torch|BUNDLE[:P]",
        help="the PyTorch model named in the manifest (default), or a precision of a bundle, which needs no torch",
    )
    group.add_argument("--model", metavar="M", help="where the checkpoint lies now (default: as in the manifest)")
    group.add_argument("--adapter", metavar="A", help="where the adapter lies now (default: as in the manifest)")
    group.add_argument("--device", default="cpu", help="of the PyTorch model (default: cpu)")
    group.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="default: fp32")


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("texts and tasks")
    group.add_argument(
        "--texts", type=Path, metavar="FILE", help="one text a line, or .jsonl with text and instruction (or .gz)"
    )
    group.add_argument("--instruction", default="", metavar="I", help="put before every text that brings none")
    add_task_flags(group)
    group.add_argument(
        "--cross-steps", action="store_true", help="the matrix of queries with k steps, documents with j steps"
    )


def _add_gate_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("gates", "limits in place of the defaults, which depend on the precision")
    for name, meaning in (
        ("min-cosine", "smallest cosine to the reference, every text and step"),
        ("min-rank-correlation", "Spearman of pairwise similarities, every step"),
        ("min-overlap", "mean share of common ten nearest neighbors, every step"),
        ("max-task-drop", "loss of score on a task, with K steps"),
        ("max-batch-difference", "difference of an element, a text alone against in a batch"),
    ):
        group.add_argument(f"--{name}", type=float, metavar="X", help=meaning)


if __name__ == "__main__":
    sys.exit(main())
