"""Charts of a parity report: error by step, cosines and similarities."""

from pathlib import Path
from typing import Any

import numpy as np

from gircse.evaluation.parity.run import ParityResult
from gircse.reporting.figures import new_figure, save_chart
from gircse.reporting.similarity import similarities
from gircse.runtime.numerics import Float32, row_cosine

SCATTER_PAIRS = 5000
SMALLEST_ERROR = 1e-16
"""Where a logarithmic axis ends: below it, float64 cannot tell a cosine from 1."""


def draw_parity_charts(result: ParityResult, directory: Path) -> list[Path]:
    """Draw error against step, cosine histogram and similarity scatter as PNG.

    Returns:
        The files, in the order in which a report shows them.
    """
    charts = (
        ("error-by-step", _error_by_step),
        ("cosine-histogram", _cosine_histogram),
        ("similarity-scatter", _similarity_scatter),
    )
    return [path for name, draw in charts for path in save_chart(draw(result), directory / name, formats=("png",))]


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


def _pair_similarities(vectors: Float32) -> Any:
    """Similarities of the same seeded choice of pairs, whatever the vectors."""
    pairs = np.triu_indices(min(len(vectors), 1000), k=1)
    chosen = np.random.default_rng(0).permutation(len(pairs[0]))[:SCATTER_PAIRS]
    some = vectors[:1000]
    return similarities(some, some)[pairs][chosen]
