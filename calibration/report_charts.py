"""Charts of a calibration: ranges by layer and step, smoothing, error, and loss by kind of input and by layer.

Axes of ranges, errors and losses are logarithmic; a value of 0 leaves a gap.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from numpy.typing import NDArray

from gircse.calibration.calibration_file import Calibration, Fidelity, InputCalibration
from gircse.calibration.int8.scheme import (
    SMOOTHED,
    VOCABULARY_INPUT,
    InputKind,
    QuantizedInput,
    decoder_inputs,
    layer_inputs,
)
from gircse.reporting.figures import new_figure, new_panels, save_chart

NO_LOSS = 1e-12
"""Rank correlations in float64 that are closer to 1 than this differ from it only by rounding."""

LOSS_LABEL = "1 - rank correlation"


def draw_calibration_charts(calibration: Calibration, directory: Path) -> list[Path]:
    """Draw the charts as PNG; the trade-off only where inputs had to be excluded.

    Returns:
        The files.
    """
    charts: dict[str, Callable[[Calibration], Any]] = {
        "ranges-by-step": _ranges_by_step,
        "migration": _migration,
        "error": _error,
    }
    if calibration.sensitivity.kinds:
        charts["sensitivity"] = _sensitivity
    if calibration.sensitivity.curve:
        charts["trade-off"] = _trade_off
    return [
        path
        for name, draw in charts.items()
        for path in save_chart(draw(calibration), directory / name, formats=("png",))
    ]


def calibrated_inputs(calibration: Calibration) -> dict[QuantizedInput, InputCalibration]:
    """Return what was calibrated, in the order of the computation."""
    layers = len(calibration.inputs) // len(layer_inputs(0))
    found = calibration.inputs
    return {one: found[one.name] for one in decoder_inputs(layers) if one.name in found}


def inputs_by_kind(calibration: Calibration) -> dict[InputKind, list[InputCalibration]]:
    """Return the calibrations by kind, in the order of the layers."""
    kinds: dict[InputKind, list[InputCalibration]] = {}
    for quantized_input, found in calibrated_inputs(calibration).items():
        kinds.setdefault(quantized_input.kind, []).append(found)
    return kinds


def measured_parts(calibration: Calibration) -> list[str]:
    """Return the names of what was quantized alone: the kinds of input, and the soft-token embedding."""
    kinds = inputs_by_kind(calibration)
    others = [point.name for point in calibration.sensitivity.kinds if point.name not in list(InputKind)]
    return [*kinds, *(others if calibration.soft_token else [])]


def rank_loss(fidelity: Fidelity) -> float:
    """Return 1 - rank correlation, and 0 for what is only rounding."""
    loss = 1 - fidelity.rank_correlation
    return loss if loss > NO_LOSS else 0.0


def excluded_count(point: Fidelity) -> int:
    """Return how many inputs a point of a trade-off curve excludes; the first, ``everything``, excludes none."""
    count = point.name.split()[0]
    return int(count) if count.isdecimal() else 0


def label(kind: str) -> str:
    """Return the name of a kind in words."""
    return kind.replace("_", " ")


def _ranges_by_step(calibration: Calibration) -> Any:
    """Draw a panel for each kind; the vocabulary projection has no layers, so its x axis is the step."""
    kinds, steps = inputs_by_kind(calibration), calibration.fingerprint.steps
    title = "Largest magnitude of the inputs, smoothed, without outlier channels"
    figure, panels = new_panels(title, [label(kind) for kind in kinds], columns=2)
    norm = BoundaryNorm(np.arange(0.5, max(steps, 1) + 1), max(steps, 1))
    colors = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.2, 0.95, max(steps, 1))))
    for axes, (kind, inputs) in zip(panels, kinds.items(), strict=True):
        ranges = _positive([found.ranges for found in inputs])
        if kind is InputKind.VOCABULARY:
            axes.plot(np.arange(1, steps + 1), ranges[0, 1:], color="lightgrey", zorder=1)
            axes.scatter(np.arange(1, steps + 1), ranges[0, 1:], c=np.arange(1, steps + 1), cmap=colors, norm=norm)
        else:
            for step in range(1, steps + 1):
                axes.plot(ranges[:, step], ".-", color=colors(norm(step)), linewidth=1, markersize=4)
            axes.plot(ranges[:, 0], ".-", color="black", label="prompt")
        axes.set_xlabel("step k" if kind is InputKind.VOCABULARY else "layer")
        axes.xaxis.set_major_locator(_whole_numbers())
        _log_if_any(axes, "y", ranges)
    panels[0].legend(fontsize="small")
    if steps:
        mappable = matplotlib.cm.ScalarMappable(norm, colors)
        figure.colorbar(mappable, ax=panels, label="step k", ticks=_whole_numbers(), shrink=0.6)
    return figure


def _migration(calibration: Calibration) -> Any:
    """Draw a row for each kind that can be smoothed, a column for each layer."""
    kinds = {kind: inputs for kind, inputs in inputs_by_kind(calibration).items() if kind in SMOOTHED}
    figure, axes = new_figure("SmoothQuant's migration strength", x="layer", y="")
    strengths = np.array(
        [[np.nan if found.migration is None else found.migration for found in inputs] for inputs in kinds.values()]
    )
    colors = matplotlib.colormaps["viridis"].with_extremes(bad="lightgrey")
    image = axes.imshow(strengths, aspect="auto", interpolation="nearest", cmap=colors, vmin=0, vmax=1)
    axes.grid(visible=False)
    axes.set_yticks(range(len(kinds)), [label(kind) for kind in kinds])
    axes.xaxis.set_major_locator(_whole_numbers())
    figure.colorbar(image, label="strength (grey: not smoothed)")
    return figure


def _error(calibration: Calibration) -> Any:
    figure, axes = new_figure("Error of each quantized product alone", x="layer", y="relative error (RMS)")
    every = []
    for index, (kind, inputs) in enumerate(inputs_by_kind(calibration).items()):
        errors = _positive([found.error for found in inputs])
        every.append(errors)
        if kind is not InputKind.VOCABULARY:
            axes.plot(errors, ".-", color=f"C{index}", label=label(kind))
        elif np.isfinite(errors).all():
            axes.axhline(errors[0], linestyle="--", color=f"C{index}", label=label(kind))
    axes.xaxis.set_major_locator(_whole_numbers())
    _log_if_any(axes, "y", np.concatenate(every))
    axes.legend(fontsize="small")
    return figure


def _sensitivity(calibration: Calibration) -> Any:
    """Draw each kind alone on the left, each layer alone on the right if layers were measured.

    The vocabulary projection is among the kinds.
    """
    found, kinds = calibration.sensitivity, measured_parts(calibration)
    titles = ["one kind of input", *(["one layer"] if found.layers else [])]
    figure, (by_kind, *others) = new_panels("Loss with one part quantized alone", titles, columns=len(titles))
    points = [point for point in found.kinds if point.name in kinds]
    losses = _losses(points)
    by_kind.plot(losses, [kinds.index(point.name) for point in points], "o")
    by_kind.set_yticks(range(len(kinds)), [label(kind) for kind in kinds])
    by_kind.set(xlabel=LOSS_LABEL, ylim=(len(kinds) - 0.5, -0.5))
    if calibration.max_drop:
        by_kind.axvline(calibration.max_drop, color="black", linestyle=":", linewidth=1)
    _log_if_any(by_kind, "x", losses)
    for by_layer in others:
        _loss_by_layer(by_layer, found.layers, calibration.max_drop)
    return figure


def _loss_by_layer(axes: Any, points: Iterable[Fidelity], max_drop: float) -> None:
    losses = _losses(point for point in points if point.name != VOCABULARY_INPUT.name)
    axes.plot(losses, ".-")
    axes.set(xlabel="layer", ylabel=LOSS_LABEL)
    axes.xaxis.set_major_locator(_whole_numbers())
    if max_drop:
        axes.axhline(max_drop, color="black", linestyle=":", linewidth=1, label="--max-drop")
        axes.legend(fontsize="small")
    _log_if_any(axes, "y", losses)


def _trade_off(calibration: Calibration) -> Any:
    """Draw the loss by the number of excluded inputs, where the search measured it; a star marks the choice."""
    figure, axes = new_figure("Loss by inputs excluded", x="inputs excluded, most sensitive first", y=LOSS_LABEL)
    found = calibration.sensitivity
    losses = _losses(found.curve)
    counts = [excluded_count(point) for point in found.curve]
    axes.plot(counts, losses, "o-")
    axes.plot(
        len(found.excluded), losses[counts.index(len(found.excluded))], "*", color="C0", markersize=16, label="chosen"
    )
    if calibration.max_drop:
        axes.axhline(calibration.max_drop, color="black", linestyle=":", linewidth=1, label="--max-drop")
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xlim(left=-0.5)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    _log_if_any(axes, "y", losses)
    axes.legend(fontsize="small")
    return figure


def _losses(points: Iterable[Fidelity]) -> NDArray[np.float64]:
    return _positive([rank_loss(point) for point in points])


def _positive(values: Any) -> NDArray[np.float64]:
    """Return what a logarithmic axis can show; NaN, a gap, for the rest."""
    array = np.array(values, np.float64)
    return np.where(array > 0, array, np.nan)


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(integer=True, min_n_ticks=1)


def _log_if_any(axes: Any, axis: str, *values: NDArray[np.float64]) -> None:
    """Make an axis logarithmic unless there is nothing to show."""
    if any(np.isfinite(some).any() for some in values):
        axes.set(**{f"{axis}scale": "log"})
