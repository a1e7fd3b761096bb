"""``gircse-export``: from a checkpoint to a bundle."""

import argparse
import dataclasses
import logging
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

from gircse.checkpoint.model_settings import ModelSettings, add_model_flags
from gircse.checkpoint.reference_choice import add_reference_flags
from gircse.runtime.command import comma_separated, parse_arguments, run_command, write_stdout
from gircse.runtime.manifest import Layout
from gircse.runtime.precision import Precision


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parse_arguments(build_parser(), argv)
    logging.getLogger("gircse").setLevel(logging.INFO)
    return run_command("gircse-export", lambda: _export(args), extras="export,demo")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command; model settings that are not given are absent from what it parses."""
    parser = argparse.ArgumentParser(
        prog="gircse-export",
        description=(
            "Trace a decoder LLM with K soft-token refinement steps and write a bundle that runs without torch."
        ),
    )
    add_model_flags(parser)
    parser.add_argument(
        "--layout",
        type=Layout,
        choices=list(Layout),
        default=Layout.UNROLLED,
        metavar="unrolled|stepwise",
        help="what ONNX Runtime runs: one graph with K steps, or one that runs once per step, K chosen at run time",
    )
    parser.add_argument(
        "--precision",
        dest="precisions",
        type=comma_separated(_precision),
        default=(Precision.FP32,),
        metavar="P,...",
        help=f"variants to write: {', '.join(Precision)} (default: fp32)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="file of gircse-calibrate, which the int8 variants need; supplies the model settings that are not given",
    )
    parser.add_argument(
        "--keep-float32",
        type=comma_separated(_weight_name),
        default=(),
        metavar="NAME,...",
        help="parts of weight names, such as layers.3.mlp, whose matrix products stay in FP32",
    )
    parser.add_argument(
        "--probe-texts",
        type=Path,
        metavar="FILE",
        help="texts, one per line, to search for values that FP16 cannot hold (default: a dozen built-in ones)",
    )
    parser.add_argument(
        "--query-instruction",
        default="",
        metavar="TEXT",
        help="instruction that Embedder.encode_query puts before a text (default: none)",
    )
    parser.add_argument(
        "--max-shard-gib",
        dest="max_shard_bytes",
        type=_gib,
        metavar="GIB",
        help="split the weights into files of at most this size, for stores with a limit (default: one file)",
    )
    add_reference_flags(parser, dtype=False)
    parser.add_argument("--output", type=Path, metavar="DIR", help="bundle directory (default: gircse-MODEL-K)")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing: print what each stage will take, and what would be refused; of a Hugging Face model only "
        "small files and headers are downloaded",
    )
    return parser


def _precision(name: str) -> Precision:
    try:
        return Precision(name)
    except ValueError as err:
        raise ValueError(f"{name!r} is not a precision; choose from {', '.join(Precision)}") from err


def _gib(text: str) -> int:
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB above 0")
    return int(size * 2**30)


def _weight_name(name: str) -> str:
    if not name:  # it would match every weight
        raise ValueError("an entry is empty; name a part of a weight's name, such as layers.3.mlp")
    return name


def _export(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    # Here, not above: torch takes seconds to import, and --help should not.
    from gircse.export.dry_run import plan_export
    from gircse.export.exporter import export_bundle
    from gircse.export.options import ExportOptions

    settings = _model_settings(args)
    flags = {**vars(args), **dataclasses.asdict(settings), "output": args.output or _default_output(settings)}
    is_dry_run = flags.pop("dry_run")
    options = ExportOptions(**flags)
    if is_dry_run:
        plan = plan_export(options)
        write_stdout(f"{line}\n" for line in plan.lines())
        return 2 if plan.refusals else 0
    bundle = export_bundle(options)
    _print_summary(bundle, time.perf_counter() - start)
    return 0


def _model_settings(args: argparse.Namespace) -> ModelSettings:
    """Return the flags that were given; for the others what the calibration was made with, else the defaults."""
    from gircse.calibration.calibration_file import Calibration
    from gircse.checkpoint.source import check_in_reach

    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(ModelSettings)
        if hasattr(args, field.name)
    }
    if args.calibration is None:
        return ModelSettings(**given)
    calibration = Calibration.read(args.calibration)
    made = calibration.fingerprint
    for name, source in (("model", made.model), ("adapter", made.adapter)):
        if name not in given and source is not None:
            check_in_reach(f"--{name}", source)
    calibrated: dict[str, Any] = dict(calibration.settings)
    return ModelSettings(**calibrated | given)


def _default_output(settings: ModelSettings) -> Path:
    name = re.sub(r"[^\w.-]+", "-", Path(settings.model).name) or "model"
    return Path(f"gircse-{name}-{settings.steps}")


def _print_summary(bundle: Path, seconds: float) -> None:
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    print(f"  {size / 2**20:.0f} MiB, {seconds:.0f} s", file=sys.stderr)
    print(f"  next: gircse-embed {bundle} --self-test", file=sys.stderr)
    print(bundle)


if __name__ == "__main__":
    sys.exit(main())
