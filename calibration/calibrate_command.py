"""``gircse-calibrate``: from texts to the file that INT8 variants are exported with."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gircse.calibration.calibration_file import SensitivityMode
from gircse.calibration.int8.thresholds import Method
from gircse.checkpoint.model_settings import add_model_flags
from gircse.checkpoint.reference_choice import add_reference_flags
from gircse.runtime.command import parse_arguments, run_command

if TYPE_CHECKING:
    from gircse.calibration.calibration_file import Calibration


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code, 2 for an error."""
    args = parse_arguments(build_parser(), argv)
    return run_command(
        "gircse-calibrate",
        lambda: _run(args),
        extras="calibration",
        interrupted="the same command resumes it",
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="gircse-calibrate",
        description="Measure a model on texts, in the prompt and at every refinement step, for its INT8 variants.",
    )
    parser.add_argument(
        "--texts", type=Path, required=True, metavar="FILE", help="file with one text per line; .gz is unpacked"
    )
    add_model_flags(parser)
    parser.add_argument(
        "--method",
        type=Method,
        choices=list(Method),
        default=Method.MAX,
        metavar="|".join(Method),
        help="how activation thresholds are chosen (default: max)",
    )
    parser.add_argument(
        "--smooth",
        type=_smooth,
        metavar="A|auto",
        help="SmoothQuant's migration strength, 0 to 1, or a search for each input (default: auto)",
    )
    parser.add_argument(
        "--samples", type=int, default=512, metavar="N", help="maximum number of texts to observe (default: 512)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the choice of texts (default: 0)")
    parser.add_argument(
        "--max-drop",
        type=float,
        default=0.005,
        metavar="D",
        help="allowed loss of rank correlation; beyond it, inputs are excluded from quantization (default: 0.005)",
    )
    parser.add_argument(
        "--sensitivity",
        type=_sensitivity,
        metavar="full|kinds|off|auto",
        help="what --max-drop is judged by: each kind of input and each layer quantized alone, and each input if the "
        "loss is too large; each kind alone; or nothing. auto measures what 20 minutes are enough for, at least kinds "
        "(default: auto)",
    )
    add_reference_flags(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("calibration.json"),
        metavar="FILE",
        help="file to write (default: calibration.json)",
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="directory for calibration.md and its charts")
    return parser


def _run(args: argparse.Namespace) -> int:
    # Here, not above: torch takes seconds to import, and --help should not.
    from gircse.calibration.calibrate import CalibrationOptions, calibrate
    from gircse.calibration.report import write_report
    from gircse.reporting.files import open_report_directory

    start = time.perf_counter()
    report: Path | None = args.report
    options = CalibrationOptions(**{name: value for name, value in vars(args).items() if name != "report"})
    open_report_directory(report)
    calibration = calibrate(options)
    if report is not None:
        write_report(calibration, report)
    _print_summary(calibration, time.perf_counter() - start)
    print(args.output)
    return 0


def _print_summary(calibration: "Calibration", seconds: float) -> None:
    from gircse.reporting.sizes import gib, peak_memory

    result, excluded = calibration.sensitivity.result, len(calibration.sensitivity.excluded)
    if result is None:
        fidelity = "sensitivity not measured, so what it costs is unknown"
    else:
        fidelity = f"rank correlation {result.rank_correlation:.4f}, top-10 overlap {result.overlap:.3f}"
    print(
        f"  int8: {fidelity}, {excluded} of {len(calibration.inputs)} inputs excluded from quantization",
        file=sys.stderr,
    )
    if result is not None and 1 - result.rank_correlation > calibration.max_drop:
        print(f"  warning: the loss is still more than --max-drop {calibration.max_drop:g}", file=sys.stderr)
    print(f"  {seconds:.0f} s, peak memory {gib(peak_memory())}", file=sys.stderr)


def _smooth(text: str) -> float | None:
    try:
        return None if text == "auto" else float(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto; it can be 0 to 1, or auto") from err


def _sensitivity(text: str) -> SensitivityMode | None:
    try:
        return None if text == "auto" else SensitivityMode(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r} is none of full, kinds, off and auto") from err


if __name__ == "__main__":
    sys.exit(main())
