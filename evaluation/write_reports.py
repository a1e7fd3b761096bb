"""Write reports into a directory: each file atomically, other files left alone."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from gircse.evaluation.bench import report_text as bench_text
from gircse.evaluation.bench.report_charts import draw_bench_charts
from gircse.evaluation.bench.report_schema import BenchReport
from gircse.evaluation.parity import report_text as parity_text
from gircse.evaluation.parity.report_charts import draw_parity_charts
from gircse.evaluation.parity.run import ParityResult
from gircse.reporting.files import write_files
from gircse.runtime.errors import OutputError


def write_parity_report(result: ParityResult, directory: Path) -> list[Path]:
    """Write parity.json, parity.md, parity.xml and the charts.

    Returns:
        The files.

    Raises:
        OutputError: they cannot be written.
    """
    with _writing(directory):
        charts = draw_parity_charts(result, directory)
        contents = {
            "parity.json": result.report.to_json(),
            "parity.md": _with_charts(parity_text.markdown(result.report, result.prompts), charts),
            "parity.xml": parity_text.junit(result.report),
        }
        return [*write_files(contents, directory), *charts]


def write_bench_report(report: BenchReport, directory: Path) -> list[Path]:
    """Write bench.json, bench.md and the charts.

    Returns:
        The files.

    Raises:
        OutputError: they cannot be written.
    """
    with _writing(directory):
        charts = draw_bench_charts(report, directory)
        contents = {
            "bench.json": report.to_json(),
            "bench.md": _with_charts(bench_text.markdown(report), charts),
        }
        return [*write_files(contents, directory), *charts]


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise OutputError(f"--report {directory}", f"cannot be written: {err.strerror or err}") from err


def _with_charts(text: str, charts: Sequence[Path]) -> bytes:
    shown = [f"![{path.stem}]({path.name})\n" for path in charts if path.suffix == ".png"]
    return "\n".join([text, *shown]).encode()
