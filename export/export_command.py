"""``gircse-export``: from a checkpoint to a bundle."""

import argparse
import logging
import re
import resource
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from gircse.checkpoint.model_settings import ModelSettings, add_model_flags
from gircse.runtime.errors import GircseError
from gircse.runtime.manifest import Layout
from gircse.runtime.precision import Precision


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code, 2 for an error."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("gircse").setLevel(logging.INFO)
    start = time.perf_counter()
    try:
        # Here, not above: torch takes seconds to import, and --help should not.
        from gircse.export.exporter import export_bundle
        from gircse.export.options import ExportOptions

        settings = _settings(args)
        options = ExportOptions(
            **{**vars(args), **settings, "output": args.output or _default_output(ModelSettings(**settings))}
        )
        bundle = export_bundle(options)
    except GircseError as err:
        print(f"gircse-export: error: {err}", file=sys.stderr)
        return 2
    except ImportError as err:
        print(
            f"gircse-export: error: {err.name or err} is not installed | the export packages | "
            "pip install 'gircse-deploy[export,demo]'",
            file=sys.stderr,
        )
        return 2
    _print_summary(bundle, time.perf_counter() - start)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gircse-export",
        description="Trace a decoder LLM with K soft-token refinement steps and write a bundle that runs without torch.",
    )
    add_model_flags(parser)
    parser.add_argument(
        "--layout",
        type=Layout,
        choices=list(Layout),
        default=Layout.UNROLLED,
        metavar="unrolled|stepwise",
        help="what ONNX Runtime runs: one graph with K steps, or one that runs once a step, K chosen at run time",
    )
    parser.add_argument(
        "--precision",
        dest="precisions",
        type=_precisions,
        default=(Precision.FP32,),
        metavar="P,...",
        help=f"variants to write: {', '.join(Precision)} (default: fp32)",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="file of gircse-calibrate, which the int8 variants need"
    )
    parser.add_argument(
        "--keep-float32",
        nargs="+",
        default=(),
        metavar="NAME",
        help="parts of weight names, such as layers.3.mlp, whose matrix products stay in FP32",
    )
    parser.add_argument(
        "--probe-texts",
        type=Path,
        metavar="FILE",
        help="texts, one a line, to look for values that FP16 cannot hold (default: a dozen built-in ones)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="bundle directory (default: gircse-MODEL-K)")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    return parser


def _precisions(text: str) -> tuple[Precision, ...]:
    try:
        return tuple(Precision(name.strip()) for name in text.split(","))
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{err}; choose from {', '.join(Precision)}") from err


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the model's settings: what is not given is as in the calibration, if there is one."""
    from gircse.calibration.calibration_file import Calibration

    given = {
        field.name: value for field in fields(ModelSettings) if (value := getattr(args, field.name, None)) is not None
    }
    return {**(Calibration.read(args.calibration).settings if args.calibration else {}), **given}


def _default_output(settings: ModelSettings) -> Path:
    name = re.sub(r"[^\w.-]+", "-", Path(settings.model).name) or "model"
    return Path(f"gircse-{name}-{settings.steps}")


def _print_summary(bundle: Path, seconds: float) -> None:
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"  {size / 2**20:.0f} MiB, {seconds:.0f} s, peak memory {peak / 2**30:.2f} GiB", file=sys.stderr)
    print(f"  next: gircse-embed {bundle} --self-test", file=sys.stderr)
    print(bundle)


if __name__ == "__main__":
    sys.exit(main())
