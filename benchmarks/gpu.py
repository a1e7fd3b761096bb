"""Parity and latency of every provider on this machine's GPU, against PyTorch on the same card, within a time limit.

    pip install ".[demo,evaluation,export,gpu,tensorrt]" pytest     # or tensorrt-rtx
    python benchmarks/gpu.py                                        # the demo
    python benchmarks/gpu.py MODEL --adapter A --minutes 60
    python benchmarks/gpu.py qwen2.5-7b --precision fp16,bf16       # random weights in that shape
    python benchmarks/gpu.py --providers cpu --device cpu           # a rehearsal without a GPU

First comes a small model: if the first provider does not give its vectors, nothing else runs. Then the export, parity
of the first provider, its latency, the other providers, and the rest. Every result has a file in the folder of results,
and the same command goes on where the last run ended; delete a file to measure again. Ends with one table, which
results.md and results.json there have too.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_plan import PROVIDERS, Options, commands, why_missing
from gpu_report import write_report
from timed_commands import Status, run_commands

from gircse.evaluation.environment import describe_environment
from gircse.runtime.command import comma_separated
from gircse.runtime.provider import Provider


def main() -> int:
    """Measure and print the table; returns 0 if all that is installed was measured, 2 if the first provider is not."""
    options = parse_options()
    deadline = time.monotonic() + 60 * options.minutes
    if reason := why_missing(options.first):
        print(reason, file=sys.stderr)
        return 2
    options.results.mkdir(parents=True, exist_ok=True)
    if not of_this_machine(options.results):
        print(
            f"{options.results} has results of another machine, driver or version: choose another --results.",
            file=sys.stderr,
        )
        return 2
    try:
        outcomes = run_commands(list(commands(options)), options.results, deadline=deadline)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"\n{write_report(outcomes, options.results, options.bundle)}")
    return 0 if all(outcome.status in (Status.DONE, Status.SKIPPED) for outcome in outcomes) else 1


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--adapter", metavar="A", help="as of gircse-export")
    parser.add_argument("--export-flags", default="", metavar="FLAGS", help="further flags of gircse-export")
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: gircse-gpu-MODEL")
    parser.add_argument(
        "--minutes",
        type=float,
        default=float(os.environ.get("GIRCSE_GPU_MINUTES", "20")),
        help="ends after this time (default: $GIRCSE_GPU_MINUTES, else 20)",
    )
    parser.add_argument("--providers", type=comma_separated(Provider), default=PROVIDERS, metavar="P,...")
    parser.add_argument("--device", default="cuda", help="of PyTorch (default: cuda)")
    parser.add_argument(
        "--precision",
        dest="precisions",
        type=comma_separated(str),
        default=("fp32", "fp16", "bf16"),
        metavar="P,...",
        help="of the bundle; latency is first measured in fp16 (default: fp32,fp16,bf16)",
    )
    parser.add_argument("--steps", type=int, default=8, metavar="K")
    parser.add_argument("--batch", dest="batches", default="1,8,32", metavar="N,...")
    parser.add_argument("--tokens", default="24,128", metavar="N,...")
    args = parser.parse_args(argv)
    args.results = (args.results or Path(f"gircse-gpu-{Path(args.model).name}")).resolve()
    return Options(**vars(args))


def of_this_machine(results: Path) -> bool:
    """Note machine and versions in a new folder of results; return whether those of an old one are the same."""
    path = results / "environment.json"
    if path.is_file():
        return bool(json.loads(path.read_text(encoding="utf-8")) == describe_environment())
    path.write_text(json.dumps(describe_environment(), indent=1), encoding="utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
