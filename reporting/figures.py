"""Figures of the reports: one style, drawn with matplotlib without a display, the same bytes for the same numbers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from gircse.runtime.atomic_file import atomic_write

matplotlib.use("Agg")


def new_figure(title: str, *, x: str, y: str) -> tuple[Any, Any]:
    """Return a figure and its axes in our one style."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y)
    _style(axes)
    return figure, axes


def new_panels(title: str, panels: Sequence[str], *, columns: int) -> tuple[Any, list[Any]]:
    """Return a figure and one axes for each panel's title, row by row."""
    from matplotlib import pyplot

    rows = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(4.5 * columns, 3.2 * rows + 0.4), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    every = list(grid.flat)
    for axes, panel in zip(every, panels, strict=False):
        axes.set(title=panel)
        _style(axes)
    for unused in every[len(panels) :]:
        unused.remove()
    return figure, every[: len(panels)]


def save_chart(figure: Any, stem: Path, *, formats: Sequence[str]) -> Iterator[Path]:
    """Write a figure in each format, whole or not at all, and close it."""
    from matplotlib import pyplot

    for name in formats:
        path = stem.with_name(f"{stem.name}.{name}")
        # Without a date, the same numbers give the same file.
        metadata = {"Date": None} if name == "svg" else {}
        with atomic_write(path) as file:
            figure.savefig(file, format=name, dpi=144, metadata=metadata)
        yield path
    pyplot.close(figure)


def _style(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
