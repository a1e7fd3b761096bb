"""Charts of a parity report: error by step, cosines and similarities."""

from pathlib import Path
from typing import Any

import numpy as np

from gircse.evaluation.parity.layer_errors import column_of
from gircse.evaluation.parity.report_schema import LayerReport
from gircse.evaluation.parity.run import ParityResult
from gircse.reporting.figures import new_figure, new_panels, save_chart
from gircse.reporting.similarity import similarities
from gircse.runtime.numerics import Float32, row_cosine

SCATTER_PAIRS = 5000
SMALLEST_ERROR = 1e-16
"""Where a logarithmic axis ends: below it, float64 cannot tell a cosine from 1."""
SMALLEST_LAYER_ERROR = 1e-8
"""The same for relative errors of FP32 values."""


def draw_parity_charts(result: ParityResult, directory: Path) -> list[Path]:
    """Draw error against step, cosine histogram, similarity scatter, and located errors by layer as PNG.

    Returns:
        The files, in the order in which a report shows them.
    """
    charts = (
        ("error-by-step", _error_by_step),
        ("cosine-histogram", _cosine_histogram),
        ("similarity-scatter", _similarity_scatter),
    )
    paths = [path for name, draw in charts for path in save_chart(draw(result), directory / name, formats=("png",))]
    for candidate in result.report.candidates:
        if candidate.layers is not None:
            title = f"{result.report.bundle}:{candidate.precision} against {result.report.reference}"
            stem = directory / f"layers-{candidate.precision}"
            paths += save_chart(_layer_errors(title, candidate.layers), stem, formats=("png",))
    return paths


def _error_by_step(result: ParityResult) -> Any:
    title = f"{result.report.bundle}: largest error of a text against {result.report.reference}"
    figure, axes = new_figure(title, x="step k (0 is the prompt)", y="1 - cosine")
    for index, candidate in enumerate(result.report.candidates):
        series = (
            ("z_k, the embedding", "-", [step.cosine_min for step in candidate.steps]),
            ("h_k running freely", "--", [step.state_cosine_min for step in candidate.steps]),
            ("h_k teacher-forced", ":", [step.forced_state_cosine_min for step in candidate.steps]),
        )
        for label, line, cosines in series:
            errors = np.maximum(1 - np.array(cosines), SMALLEST_ERROR)
            axes.plot(errors, line, marker=".", color=f"C{index}", label=f"{candidate.precision}: {label}")
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")
    return figure


def _cosine_histogram(result: ParityResult) -> Any:
    title = f"{result.report.bundle}: texts by error, K = {result.report.steps}"
    figure, axes = new_figure(title, x="1 - cosine to the reference", y="texts")
    errors = {
        precision: np.maximum(1 - row_cosine(vectors[:, -1], result.reference[:, -1]), SMALLEST_ERROR)
        for precision, vectors in result.candidates.items()
    }
    every = np.concatenate(list(errors.values()))
    bins = np.geomspace(every.min() / 2, every.max() * 2, 40)
    for precision, values in errors.items():
        axes.hist(values, bins=bins, alpha=0.6, label=precision)
    axes.set_xscale("log")
    axes.legend()
    return figure


def _similarity_scatter(result: ParityResult) -> Any:
    title = f"{result.report.bundle}: similarity of pairs of texts, K = {result.report.steps}"
    figure, axes = new_figure(title, x=f"cosine, {result.report.reference}", y="cosine, candidate")
    wanted = _pair_similarities(result.reference[:, -1])
    for precision, vectors in result.candidates.items():
        axes.scatter(wanted, _pair_similarities(vectors[:, -1]), s=4, alpha=0.4, label=precision)
    ends = [wanted.min(), wanted.max()]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.legend()
    return figure


def _layer_errors(title: str, layers: LayerReport) -> Any:
    """One cell for each step and part; what stands out is crossed."""
    from matplotlib.colors import LogNorm

    figure, panels = new_panels(
        f"{title}, text {layers.text}", ["error of each part alone", "running error of the residual stream"], columns=1
    )
    for axes, rows in zip(panels, (layers.alone, layers.running), strict=True):
        errors = np.maximum(np.array(rows), SMALLEST_LAYER_ERROR)
        lowest = errors[:, 1:-1].min()  # a norm that is exact would take the contrast from the rest
        mesh = axes.pcolormesh(errors, norm=LogNorm(vmin=lowest, vmax=max(errors.max(), 2 * lowest)))
        figure.colorbar(mesh, ax=axes)
        parts = errors.shape[1]
        shown = sorted({0, *range(1, parts - 1, 5), parts - 1})
        axes.set(xlabel="layer", ylabel="step k")
        axes.set_xticks([part + 0.5 for part in shown], [_short_part_name(part, parts) for part in shown])
        axes.set_yticks([step + 0.5 for step in range(len(rows))], [str(step) for step in range(len(rows))])
        axes.grid(visible=False)
    at = [(jump.step, column_of(jump.part, layers=parts - 2)) for jump in layers.jumps]
    panels[0].plot([part + 0.5 for _, part in at], [step + 0.5 for step, _ in at], "rx")
    return figure


def _short_part_name(part: int, parts: int) -> str:
    return "in" if part == 0 else "norm" if part == parts - 1 else str(part - 1)


def _pair_similarities(vectors: Float32) -> Any:
    """Similarities of the same seeded choice of pairs, whatever the vectors."""
    pairs = np.triu_indices(min(len(vectors), 1000), k=1)
    chosen = np.random.default_rng(0).permutation(len(pairs[0]))[:SCATTER_PAIRS]
    some = vectors[:1000]
    return similarities(some, some)[pairs][chosen]
