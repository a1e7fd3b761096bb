"""A benchmark for people: ratios are to the first backend of a row, and what was not run is a dash."""

import json

import msgspec
import pytest

from gircse.evaluation.bench.report_schema import BackendCost, BenchReport, Latency, Quality, Spread
from gircse.evaluation.bench.report_text import markdown, terminal_tables


def spread(median: float) -> Spread:
    return Spread(median=median, p95=2 * median, low=median / 2, high=3 * median, repeats=5)


@pytest.fixture
def report() -> BenchReport:
    names = ("demo:fp32", "torch fp32")
    return BenchReport(
        schema_version=1,
        threads=2,
        warm_up=2,
        instruction_tokens=18,
        bandwidth=12.34e9,
        backends=tuple(BackendCost(name, spread(1.0), 3 << 29, 5 << 20, 0.9999999) for name in names),
        latencies=(
            Latency(names[0], 1, 16, 8, spread(0.1), 10.0, 0.05),
            Latency(names[1], 1, 16, 8, spread(1.5), 0.67, None),
            Latency(names[1], 1, 16, 1, spread(0.02), 50.0, None),
        ),
        quality=(Quality(names[0], "pairs", "Spearman", (0.5, 0.75)),),
        environment={"cores": "2"},
    )


def test_markdown(report: BenchReport) -> None:
    text = markdown(report)
    assert "2 runs of each to warm up. Every text comes after an instruction of 18 tokens. Memory bandwidth" in text
    lines = text.splitlines()
    for line in (
        "| batch x tokens | k | demo:fp32 | torch fp32 |",
        "| 1 x 16 | 8 | 100.0 ms (200.0 ms) | 1.50 s (3.00 s), 15.00 x |",
        "| 1 x 16 | 1 | - | 20.0 ms (40.0 ms) |",
        "| demo:fp32 | 1.00 s (0.50 to 3.00) | 1.50 GiB | 5 MiB | 1.000000 |",
        "| demo:fp32 | 1 x 16 | 8 | 0.1000 | 0.2000 | 0.0500 to 0.3000 | 5 | 10.0 | 0.0500 |",
        "| backend | task | k=0 | k=1 |",
        "| demo:fp32 | pairs, Spearman | 0.5000 | 0.7500 |",
    ):
        assert line in lines, line


def test_the_terminal_shows_the_tables_of_the_file(report: BenchReport) -> None:
    costs, latencies, quality = terminal_tables(report)
    assert latencies.title == "Median time of a run (p95), 2 threads, texts after an instruction of 18 tokens"
    assert [table.row_count for table in (costs, latencies, quality)] == [2, 2, 1]
    assert [column.header for column in latencies.columns] == ["batch x tokens", "k", "demo:fp32", "torch fp32"]


def test_a_report_from_before_instructions_is_read(report: BenchReport) -> None:
    content = json.loads(report.to_json())
    del content["instruction_tokens"]
    assert msgspec.convert(content, BenchReport).instruction_tokens == 0
