"""``gircse-calibrate``: from texts to the file that INT8 variants are exported with."""

import argparse
import logging
import resource
import sys
import time
from pathlib import Path

from gircse.calibration.int8.thresholds import Method
from gircse.checkpoint.model_settings import add_model_flags
from gircse.runtime.errors import GircseError


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code, 2 for an error."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    start = time.perf_counter()
    try:
        # Here, not above: torch takes seconds to import, and --help should not.
        from gircse.calibration.calibrate import CalibrationOptions, calibrate
        from gircse.calibration.report import prepare_report, write_report

        report: Path | None = args.report
        prepare_report(report)
        flags = {name: value for name, value in vars(args).items() if name != "report"}
        calibration = calibrate(CalibrationOptions(**flags))
        if report is not None:
            write_report(calibration, report)
    except GircseError as err:
        print(f"gircse-calibrate: error: {err}", file=sys.stderr)
        return 2
    except ImportError as err:
        print(
            f"gircse-calibrate: error: {err.name or err} is not installed | the calibration packages | "
            "pip install 'gircse-deploy[export,evaluation,demo]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("gircse-calibrate: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    result, kept = calibration.sensitivity.result, len(calibration.sensitivity.excluded)
    print(
        f"  int8: rank correlation {result.rank_correlation:.4f}, top-10 overlap {result.overlap:.3f}, {kept} of "
        f"{len(calibration.inputs)} inputs kept in float",
        file=sys.stderr,
    )
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"  {time.perf_counter() - start:.0f} s, peak memory {peak / 2**30:.2f} GiB", file=sys.stderr)
    print(args.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gircse-calibrate",
        description="Measure a model on texts, in the prompt and at every refinement step, for its INT8 variants.",
    )
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE", help="one text a line; .gz is unpacked")
    add_model_flags(parser)
    parser.add_argument(
        "--method",
        type=Method,
        choices=list(Method),
        default=Method.MAX,
        help="how activation thresholds are chosen (default: max)",
    )
    parser.add_argument(
        "--smooth",
        type=_smooth,
        metavar="A|auto",
        help="SmoothQuant's migration strength, or the best for each input (default: auto)",
    )
    parser.add_argument("--samples", type=int, default=512, metavar="N", help="most texts to use (default: 512)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the texts (default: 0)")
    parser.add_argument(
        "--max-drop",
        type=float,
        default=0.005,
        metavar="D",
        help="loss of rank correlation beyond which inputs are kept in float (default: 0.005)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("calibration.json"), metavar="FILE", help="default: calibration.json"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write calibration.md and charts there")
    return parser


def _smooth(text: str) -> float | None:
    try:
        return None if text == "auto" else float(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text} | 0 to 1, or auto | choose another value") from err


if __name__ == "__main__":
    sys.exit(main())
