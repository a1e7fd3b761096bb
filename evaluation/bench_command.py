"""``gircse-bench``: how fast, for which K, at what quality?"""

import argparse
import sys
from pathlib import Path
from typing import Any

from gircse.evaluation.bench.backends import Baseline
from gircse.evaluation.task_flags import EXTRAS, add_task_flags, pop_task_options, show_tables
from gircse.runtime.command import add_runtime_flags, comma_separated, parse_arguments, run_command
from gircse.runtime.provider import Provider


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code, 2 for an error."""
    args = vars(parse_arguments(build_parser(), argv))
    return run_command("gircse-bench", lambda: _bench(args), extras=EXTRAS)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="gircse-bench",
        description="Measure bundles and baselines in turn, on the same inputs, threads and warm-up.",
    )
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="bundle directories of one model")
    parser.add_argument(
        "--precision",
        dest="precisions",
        type=comma_separated(str),
        default=(),
        metavar="P,...",
        help="variants (default: every one)",
    )
    parser.add_argument(
        "--batch",
        dest="batches",
        type=comma_separated(int),
        default=(1, 8, 32),
        metavar="N,...",
        help="texts of a run (default: 1,8,32)",
    )
    parser.add_argument(
        "--instruction",
        default="",
        metavar="TEXT",
        help="put before every text; stepwise graphs on the CPU are also measured with it cached",
    )
    parser.add_argument(
        "--tokens", type=comma_separated(int), metavar="N,...", help="tokens of each text (default: 16,64,256)"
    )
    parser.add_argument("--steps", type=comma_separated(int), metavar="k,...", help="default: 1,2,4,8 and K, up to K")
    parser.add_argument(
        "--against",
        type=comma_separated(Baseline),
        default=(),
        metavar=",".join(Baseline),
        help="baselines to measure in turn with the bundles",
    )
    parser.add_argument("--model", metavar="M", help="where the checkpoint is now (default: as in the manifest)")
    parser.add_argument("--adapter", metavar="A", help="where the adapter is now (default: as in the manifest)")
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE", help="model of llama.cpp (default: the first bundle's model, in Q8_0)"
    )
    parser.add_argument(
        "--repeats", type=int, default=10, metavar="N", help="maximum runs per backend and setting (default: 10)"
    )
    parser.add_argument(
        "--setting-seconds",
        dest="setting_s",
        type=float,
        default=20.0,
        metavar="S",
        help="after this time a setting gets no more than three repeats (default: 20)",
    )
    add_runtime_flags(parser, default=Provider.CPU)
    parser.add_argument("--device", default="cpu", help="of PyTorch (default: cpu)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of PyTorch (default: fp32)")
    parser.add_argument("--threads", type=int, metavar="T", help="threads per backend (default: physical cores)")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write bench.json, bench.md and charts there")
    add_task_flags(parser.add_argument_group("quality", "scores at every step, for the chart against latency"))
    return parser


def _bench(args: dict[str, Any]) -> int:
    # Here, not above: scipy and matplotlib take seconds to import, and --help should not.
    from gircse.evaluation.bench.report_text import terminal_tables
    from gircse.evaluation.bench.run import BenchOptions, run_bench
    from gircse.evaluation.write_reports import write_bench_report
    from gircse.reporting.files import open_report_directory

    report_directory: Path | None = args.pop("report")
    open_report_directory(report_directory)
    tasks = pop_task_options(args)
    report = run_bench(BenchOptions(**args, tasks=tasks))
    written = write_bench_report(report, report_directory) if report_directory else []
    show_tables(terminal_tables(report), width=160)
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
