"""Figures of the reports: one style, drawn by matplotlib without a display. Equal numbers give equal bytes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from gircse.runtime.atomic_file import atomic_write

matplotlib.use("Agg")


def new_figure(title: str, *, x: str, y: str) -> tuple[Any, Any]:
    """Return a figure with one pair of axes.

    Args:
        title: above the axes.
        x: label of the x axis.
        y: label of the y axis.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y)
    _style(axes)
    return figure, axes


def new_panels(title: str, panels: Sequence[str], *, columns: int) -> tuple[Any, list[Any]]:
    """Return a figure and one pair of axes per panel, row by row.

    Args:
        title: above the whole figure.
        panels: title of each panel.
        columns: panels in a row.
    """
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
    """Write a figure in each format, atomically, and close it.

    Args:
        figure: of ``new_figure`` or ``new_panels``.
        stem: path without the ending.
        formats: endings, such as ``png`` and ``svg``.

    Yields:
        The path of each file that was written.

    Raises:
        OSError: a file cannot be written.
    """
    from matplotlib import pyplot

    for name in formats:
        path = stem.with_name(f"{stem.name}.{name}")
        # A date would make the same numbers give different bytes.
        metadata = {"Date": None} if name == "svg" else {}
        with atomic_write(path) as file:
            figure.savefig(file, format=name, dpi=144, metadata=metadata)
        yield path
    pyplot.close(figure)


def _style(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
