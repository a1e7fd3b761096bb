"""A benchmark for people: the terminal tables and ``bench.md``."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from gircse.evaluation.bench.report_schema import BackendCost, BenchReport, Latency, Quality
from gircse.reporting.files import markdown_table
from gircse.reporting.sizes import gib

COST_COLUMNS = ("backend", "load", "peak memory", "model files", "cosine to the first")


def terminal_tables(report: BenchReport) -> list[Table]:
    """Return the tables that ``bench.md`` has too."""
    costs = _table("Loading and memory", COST_COLUMNS, [_cost_cells(cost) for cost in report.backends])
    header, rows = _latency_rows(report)
    after = f", texts after an instruction of {report.instruction_tokens} tokens" if report.instruction_tokens else ""
    tables = [costs, _table(f"Median time of a run (p95), {report.threads} threads{after}", header, rows)]
    if report.quality:
        tables.append(_table("Quality by step", *_quality_rows(report.quality)))
    return tables


def markdown(report: BenchReport) -> str:
    """Return the content of ``bench.md``."""
    header, rows = _latency_rows(report)
    spread_rows = [
        (
            entry.backend,
            f"{entry.batch} x {entry.tokens}",
            str(entry.steps),
            f"{entry.seconds.median:.4f}",
            f"{entry.seconds.p95:.4f}",
            f"{entry.seconds.low:.4f} to {entry.seconds.high:.4f}",
            str(entry.seconds.repeats),
            f"{entry.texts_per_s:.1f}",
            "" if entry.roofline_s is None else f"{entry.roofline_s:.4f}",
        )
        for entry in report.latencies
    ]
    instruction = (
        f" Every text comes after an instruction of {report.instruction_tokens} tokens."
        if report.instruction_tokens
        else ""
    )
    parts = [
        "# Benchmark",
        f"{report.threads} threads per backend, each backend in its own process, all in turn at every setting, "
        f"{report.warm_up} runs of each to warm up.{instruction} Memory bandwidth, measured: "
        f"{report.bandwidth / 1e9:.1f} GB/s.",
        "## Loading and memory",
        markdown_table(COST_COLUMNS, [_cost_cells(cost) for cost in report.backends]),
        "## Median time of a run (p95)",
        markdown_table(header, rows),
        "A ratio is the time over that of the first backend in the row.",
    ]
    if report.quality:
        parts += ["## Quality by step", markdown_table(*_quality_rows(report.quality))]
    parts += [
        "## Every measurement, in seconds",
        markdown_table(
            ("backend", "batch x tokens", "k", "median", "p95", "range", "repeats", "texts/s", "roofline"), spread_rows
        ),
        "Roofline: the time that reading the weights takes at the measured bandwidth; caches can beat it.",
        "## Environment",
        markdown_table(("what", "value"), list(report.environment.items())),
    ]
    return "\n\n".join(parts) + "\n"


def _cost_cells(cost: BackendCost) -> tuple[str, ...]:
    load = cost.load_s
    return (
        cost.backend,
        f"{load.median:.2f} s ({load.low:.2f} to {load.high:.2f})",
        gib(cost.peak_bytes),
        f"{cost.model_bytes / 2**20:.0f} MiB",
        f"{cost.min_cosine:.6f}",
    )


def _latency_rows(report: BenchReport) -> tuple[list[str], list[list[str]]]:
    """One row per setting, one column per backend; the others with their ratio to the first that ran."""
    backends = [cost.backend for cost in report.backends]
    found: dict[tuple[int, int, int], dict[str, Latency]] = {}
    for entry in report.latencies:
        found.setdefault((entry.batch, entry.tokens, entry.steps), {})[entry.backend] = entry
    rows = []
    for (batch, tokens, steps), by_backend in found.items():
        first = next(by_backend[backend] for backend in backends if backend in by_backend)
        rows.append(
            [
                f"{batch} x {tokens}",
                str(steps),
                *(_latency_cell(by_backend.get(backend), first) for backend in backends),
            ]
        )
    return ["batch x tokens", "k", *backends], rows


def _latency_cell(entry: Latency | None, first: Latency) -> str:
    if entry is None:
        return "-"
    cell = f"{_time(entry.seconds.median)} ({_time(entry.seconds.p95)})"
    if entry is first:
        return cell
    return f"{cell}, {entry.seconds.median / first.seconds.median:.2f} x"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _quality_rows(quality: Sequence[Quality]) -> tuple[list[str], list[list[str]]]:
    steps = range(len(quality[0].scores))
    rows = [
        [entry.backend, f"{entry.task}, {entry.metric}", *(f"{score:.4f}" for score in entry.scores)]
        for entry in quality
    ]
    return ["backend", "task", *(f"k={step}" for step in steps)], rows


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for index, column in enumerate(header):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table
