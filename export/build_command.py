"""``gircse-build``: from a bundle to a TensorRT engine."""

import argparse
import logging
import sys
from pathlib import Path

from gircse.export.engine.profiles import DEFAULT_BATCH, SizeRange
from gircse.runtime.command import comma_separated, parse_arguments, run_command
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider
from gircse.runtime.trt.library import MODULES


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parse_arguments(build_parser(), argv)

    def work() -> int:
        from gircse.export.engine.builder import BuildOptions, build_engine

        print(build_engine(BuildOptions(**vars(args))))
        return 0

    # TensorRT warns about every input and profile; its errors are part of ours.
    return run_command("gircse-build", work, extras=args.provider or Provider.TENSORRT, level=logging.CRITICAL)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="gircse-build", description="Build a TensorRT engine of a bundle; the runtime finds it in BUNDLE/engines."
    )
    parser.add_argument("bundle", type=Path, help="bundle directory")
    parser.add_argument("--precision", metavar="P", help="variant (default: fp16, else bf16, fp32)")
    parser.add_argument(
        "--provider",
        type=Provider,
        choices=list(MODULES),
        metavar="tensorrt|tensorrt-rtx",
        help="which TensorRT (default: the one that is installed)",
    )
    parser.add_argument(
        "--layout",
        type=Layout,
        choices=list(Layout),
        default=Layout.STEPWISE,
        metavar="stepwise|unrolled",
        help="graph to build from (default: stepwise)",
    )
    parser.add_argument(
        "--batch", type=_sizes, default=DEFAULT_BATCH, metavar="MIN:OPT:MAX", help="texts of a run (default: 1:8:64)"
    )
    parser.add_argument(
        "--tokens", type=_sizes, metavar="MIN:OPT:MAX", help="tokens of a prompt (default: 1:64:max_tokens)"
    )
    parser.add_argument(
        "--profiles",
        type=comma_separated(str),
        default=(),
        metavar="NAME=BATCH[xTOKENS],...",
        help="named profiles (default: latency=1,throughput=BATCH; for tensorrt-rtx the latter alone)",
    )
    parser.add_argument(
        "--sm",
        dest="capabilities",
        type=comma_separated(str),
        default=(),
        metavar="8.9,...",
        help="compute capabilities to build for (default: this machine's GPU; tensorrt builds for no other)",
    )
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="kernel timings of earlier builds (default: BUNDLE/engines/timing.cache)",
    )
    parser.add_argument("--workspace-gib", type=float, metavar="G", help="maximum workspace of a kernel")
    parser.add_argument(
        "--weight-streaming",
        action="store_true",
        help="for a plan that is larger than the GPU: what has no room there stays in main memory, and runs slower",
    )
    parser.add_argument(
        "--layer-outputs",
        action="store_true",
        help="a second engine that shows the values between the layers, for gircse-parity --locate",
    )
    return parser


def _sizes(text: str) -> SizeRange:
    try:
        return SizeRange.parse(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


if __name__ == "__main__":
    sys.exit(main())
