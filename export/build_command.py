"""``gircse-build``: from a bundle to a TensorRT engine."""

import argparse
import logging
import sys
from pathlib import Path

from gircse.export.engine.profiles import DEFAULT_BATCH, SizeRange
from gircse.runtime.errors import GircseError
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider
from gircse.runtime.trt.library import MODULES


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code, 2 for an error."""
    args = _parser().parse_args(argv)
    # TensorRT's warnings remark on every input and profile; its errors come with ours.
    logging.basicConfig(level=logging.CRITICAL)
    try:
        from gircse.export.engine.builder import BuildOptions, build_engine

        plan = build_engine(BuildOptions(**vars(args)))
    except GircseError as err:
        print(f"gircse-build: error: {err}", file=sys.stderr)
        return 2
    except ImportError as err:
        print(
            f"gircse-build: error: {err.name or err} is not installed | the packages of the build | "
            "pip install 'gircse-deploy[tensorrt]' or 'gircse-deploy[tensorrt-rtx]'",
            file=sys.stderr,
        )
        return 2
    print(plan)
    return 0


def _parser() -> argparse.ArgumentParser:
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
        "--batch", type=_sizes, default=DEFAULT_BATCH, metavar="MIN:EXPECTED:MAX", help="default: 1:8:64"
    )
    parser.add_argument(
        "--tokens", type=_sizes, metavar="MIN:EXPECTED:MAX", help="of a prompt (default: 1:64:max_tokens)"
    )
    parser.add_argument(
        "--profiles",
        nargs="+",
        default=(),
        metavar="NAME=BATCH[xTOKENS]",
        help="named profiles (default: latency=1 and throughput=--batch; for tensorrt-rtx the latter alone)",
    )
    parser.add_argument(
        "--sm",
        dest="capabilities",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="8.9,...",
        help="compute capabilities to build for (default: this machine's GPU; tensorrt builds for no other)",
    )
    parser.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="kernel timings of earlier builds (default: beside the plan)"
    )
    parser.add_argument("--workspace-gib", type=float, metavar="G", help="most scratch memory of a kernel")
    return parser


def _sizes(text: str) -> SizeRange:
    try:
        return SizeRange.parse(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


if __name__ == "__main__":
    sys.exit(main())
