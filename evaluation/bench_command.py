"""``gircse-bench``: how fast, for which K, at what quality?"""

import argparse
import logging
import sys
from pathlib import Path

from gircse.evaluation.task_flags import add_task_flags, pop_task_options, show_tables
from gircse.runtime.command import add_runtime_flags
from gircse.runtime.errors import GircseError
from gircse.runtime.provider import Provider

EXTRAS = "pip install 'gircse-deploy[cpu,evaluation]', and [export,demo] or [llama-cpp] for the peers"
BASELINES = ("torch", "llama.cpp")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code, 2 for an error."""
    args = vars(_parser().parse_args(argv))
    logging.basicConfig(level=logging.WARNING, format="gircse-bench: %(message)s")
    report_directory: Path | None = args.pop("report")
    try:
        # Here, not above: scipy and matplotlib take seconds to import, and --help should not.
        from gircse.evaluation.bench.report_text import terminal_tables
        from gircse.evaluation.bench.run import BenchOptions, run_bench
        from gircse.evaluation.write_reports import write_bench_report
        from gircse.reporting.files import open_report_directory

        open_report_directory(report_directory)
        tasks = pop_task_options(args)
        report = run_bench(BenchOptions(**args, tasks=tasks))
        written = write_bench_report(report, report_directory) if report_directory else []
    except (GircseError, ValueError, OSError) as err:
        print(f"gircse-bench: error: {err}", file=sys.stderr)
        return 2
    except ImportError as err:
        print(
            f"gircse-bench: error: {err.name or err} is not installed | the evaluation packages | {EXTRAS}",
            file=sys.stderr,
        )
        return 2
    show_tables(terminal_tables(report), width=160)
    for path in written:
        print(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gircse-bench",
        description="Measure bundles and their peers in turn, on the same inputs, threads and warm-up.",
    )
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="bundle directories of one model")
    parser.add_argument(
        "--precision", dest="precisions", nargs="+", default=(), metavar="P", help="variants (default: every one)"
    )
    parser.add_argument(
        "--batch", dest="batches", type=_numbers, default=(1, 8, 32), metavar="N,...", help="default: 1,8,32"
    )
    parser.add_argument("--tokens", type=_numbers, metavar="N,...", help="default: 16,64,256")
    parser.add_argument("--steps", type=_numbers, metavar="k,...", help="default: 1,2,4,8 and K, as far as K")
    parser.add_argument("--against", type=_names, default=(), metavar="torch,llama.cpp", help="peers to run in turn")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="model of llama.cpp (default: the demo's, in Q8_0)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="most runs of a side (default: 10)")
    parser.add_argument(
        "--setting-seconds",
        dest="setting_s",
        type=float,
        default=20.0,
        metavar="S",
        help="after so long a setting gets no more than three repeats (default: 20)",
    )
    add_runtime_flags(parser, default=Provider.CPU)
    parser.add_argument("--device", default="cpu", help="of PyTorch (default: cpu)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of PyTorch (default: fp32)")
    parser.add_argument("--threads", type=int, metavar="T", help="threads of each side (default: physical cores)")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write bench.json, bench.md and charts there")
    add_task_flags(parser.add_argument_group("quality", "scores at every step, for the chart against latency"))
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if unknown := [name for name in names if name not in BASELINES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: one of {', '.join(BASELINES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
