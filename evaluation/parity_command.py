"""``gircse-parity``: are these the vectors of the reference?"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from gircse.checkpoint.reference_choice import add_reference_flags
from gircse.evaluation.task_flags import EXTRAS, add_task_flags, pop_task_options, show_tables
from gircse.runtime.command import add_runtime_flags, comma_separated, parse_arguments, run_command
from gircse.runtime.errors import OptionError
from gircse.runtime.precision import ParityLimits
from gircse.runtime.provider import Provider

_LIMIT_HELP = {
    "min_cosine": "smallest cosine to the reference, every text and step",
    "min_rank_correlation": "Spearman correlation of pairwise similarities, every step",
    "min_overlap": "mean share of common ten nearest neighbors, every step",
    "max_task_drop": "loss of score on a task, with K steps",
    "max_batch_difference": "difference of an element, alone and in a batch, and with and without the prefix cache",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 passed, 1 a gate failed, 2 could not measure."""
    args = vars(parse_arguments(build_parser(), argv))
    if args["polygraphy"] is not None:
        return run_command("gircse-parity", lambda: _write_polygraphy(args), extras="cpu,evaluation,polygraphy")
    return run_command("gircse-parity", lambda: _measure(args), extras=EXTRAS)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="gircse-parity",
        description="Compare a bundle with PyTorch or with another bundle, step by step, and check it against gates.",
        epilog="exit code: 0 every gate passed, 1 a gate failed, 2 could not measure",
    )
    parser.add_argument("bundle", type=Path, help="bundle directory")
    parser.add_argument(
        "--precision",
        dest="precisions",
        type=comma_separated(str),
        default=(),
        metavar="P,...",
        help="variants to compare (default: every one except the reference)",
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write parity.json, .md, .xml and charts there")
    parser.add_argument(
        "--locate",
        action="store_true",
        help="find the layers and steps where each variant departs, on the text furthest from the reference",
    )
    parser.add_argument(
        "--polygraphy",
        type=Path,
        metavar="DIR",
        help="write the golden inputs and outputs there for `polygraphy run`, and print its commands, instead of "
        "comparing",
    )
    _add_reference_flags(parser)
    _add_data_flags(parser)
    _add_gate_flags(parser)
    add_runtime_flags(parser, default=Provider.CPU)
    parser.add_argument("--threads", type=int, metavar="T", help="threads per backend (default: left to each)")
    return parser


def _write_polygraphy(args: dict[str, Any]) -> int:
    from gircse.evaluation.parity.polygraphy_files import write_polygraphy_files
    from gircse.reporting.files import open_report_directory
    from gircse.runtime.bundle import Bundle

    directory: Path = args["polygraphy"]
    if args["report"] is not None or args["locate"]:
        raise OptionError(
            "--polygraphy", "compares nothing", "--report and --locate need a comparison", "Run the command twice."
        )
    bundle = Bundle.open(args["bundle"])
    open_report_directory(directory, flag="--polygraphy")
    written = write_polygraphy_files(bundle, directory, precisions=args["precisions"])
    for line in written.left_out:
        print(f"left out: {line}", file=sys.stderr)
    for command in written.commands:
        print(command)
    return 0


def _measure(args: dict[str, Any]) -> int:
    # Here, not above: scipy and matplotlib take seconds to import, and --help should not.
    from gircse.evaluation.parity.options import ParityOptions
    from gircse.evaluation.parity.report_text import terminal_tables
    from gircse.evaluation.parity.run import measure_parity
    from gircse.evaluation.write_reports import write_parity_report
    from gircse.reporting.files import open_report_directory

    del args["polygraphy"]
    report_directory: Path | None = args.pop("report")
    chosen = {field.name: args.pop(field.name) for field in fields(ParityLimits)}
    limits = {name: limit for name, limit in chosen.items() if limit is not None}
    tasks = pop_task_options(args)
    open_report_directory(report_directory)
    result = measure_parity(ParityOptions(**args, limits=limits, tasks=tasks))
    written = write_parity_report(result, report_directory) if report_directory else []
    show_tables(terminal_tables(result.report), width=120)
    for path in written:
        print(path)
    return 0 if result.report.passed else 1


def _add_reference_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reference")
    group.add_argument(
        "--reference",
        default="torch",
        metavar="torch|BUNDLE[:P]",
        help="the PyTorch model named in the manifest (default), or a precision of a bundle, which needs no torch",
    )
    group.add_argument("--model", metavar="M", help="where the checkpoint is now (default: as in the manifest)")
    group.add_argument("--adapter", metavar="A", help="where the adapter is now (default: as in the manifest)")
    add_reference_flags(group)


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("texts and tasks")
    group.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="one text per line, or .jsonl with text and instruction; .gz is unpacked (default: built-in texts)",
    )
    group.add_argument("--instruction", default="", metavar="I", help="put before every text that has none")
    add_task_flags(group)
    group.add_argument(
        "--cross-steps", action="store_true", help="add the matrix of queries with k steps, documents with j steps"
    )


def _add_gate_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("gates", "limits in place of the defaults, which depend on the precision")
    for name, meaning in _LIMIT_HELP.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=meaning)


if __name__ == "__main__":
    sys.exit(main())
