"""Charts of a benchmark: latency by step with the roofline, throughput by batch, quality against latency."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gircse.evaluation.bench.report_schema import BenchReport, Latency, Quality
from gircse.reporting.figures import new_figure, save_chart

FORMATS = ("png", "svg")


def draw_bench_charts(report: BenchReport, directory: Path) -> list[Path]:
    """Draw the charts as PNG and SVG.

    Returns:
        The files.
    """
    figures = {"latency-by-step": _latency_by_step(report), "throughput-by-batch": _throughput_by_batch(report)}
    for task in dict.fromkeys(entry.task for entry in report.quality):
        entries = [entry for entry in report.quality if entry.task == task]
        figures[f"quality-by-latency-{task}"] = _quality_by_latency(report, entries)
    return [path for name, figure in figures.items() for path in save_chart(figure, directory / name, formats=FORMATS)]


def _latency_by_step(report: BenchReport) -> Any:
    entries = _smallest(report)
    figure, axes = new_figure(
        f"One run of {entries[0].batch} x {entries[0].tokens} tokens, {report.threads} threads",
        x="refinement steps k",
        y="milliseconds (median, range)",
    )
    for index, backend in enumerate(dict.fromkeys(entry.backend for entry in entries)):
        points = [entry for entry in entries if entry.backend == backend]
        medians = [1000 * entry.seconds.median for entry in points]
        below = [1000 * (entry.seconds.median - entry.seconds.low) for entry in points]
        above = [1000 * (entry.seconds.high - entry.seconds.median) for entry in points]
        steps = [entry.steps for entry in points]
        axes.errorbar(steps, medians, yerr=[below, above], marker="o", capsize=3, color=f"C{index}", label=backend)
        rooflines = [1000 * entry.roofline_s for entry in points if entry.roofline_s is not None]
        if rooflines:
            label = f"{backend}: reading the weights at {report.bandwidth / 1e9:.0f} GB/s"
            axes.plot(steps, rooflines, "_--", color=f"C{index}", alpha=0.7, label=label)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return figure


def _throughput_by_batch(report: BenchReport) -> Any:
    """At the most steps, where every backend has run, and the fewest tokens."""
    steps = max(entry.steps for entry in report.latencies)
    tokens = min(entry.tokens for entry in report.latencies)
    figure, axes = new_figure(f"Throughput, {tokens} tokens, k = {steps}", x="batch", y="texts per second")
    for backend in dict.fromkeys(entry.backend for entry in report.latencies):
        points = [
            entry
            for entry in report.latencies
            if (entry.backend, entry.steps, entry.tokens) == (backend, steps, tokens)
        ]
        axes.plot([entry.batch for entry in points], [entry.texts_per_s for entry in points], marker="o", label=backend)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return figure


def _quality_by_latency(report: BenchReport, quality: Sequence[Quality]) -> Any:
    """One line for each precision, one point for each k that was measured."""
    entries = _smallest(report)
    figure, axes = new_figure(
        f"{quality[0].task}: quality against latency, by k",
        x=f"milliseconds of a run of {entries[0].batch} x {entries[0].tokens} tokens",
        y=quality[0].metric,
    )
    for one in quality:
        points = [entry for entry in entries if entry.backend == one.backend]
        times = [1000 * entry.seconds.median for entry in points]
        scores = [one.scores[entry.steps] for entry in points]
        axes.plot(times, scores, marker="o", label=one.backend)
        for entry, time, score in zip(points, times, scores, strict=True):
            axes.annotate(
                f"k={entry.steps}", (time, score), textcoords="offset points", xytext=(4, 4), fontsize="small"
            )
    axes.legend(fontsize="small")
    return figure


def _smallest(report: BenchReport) -> list[Latency]:
    """Return the measurements of the smallest batch with the fewest tokens."""
    batch, tokens = min((entry.batch, entry.tokens) for entry in report.latencies)
    return [entry for entry in report.latencies if (entry.batch, entry.tokens) == (batch, tokens)]
