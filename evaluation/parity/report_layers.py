"""Where a variant departs from the reference, for people: the terminal table and the part of ``parity.md``."""

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.table import Table

from gircse.evaluation.parity.layer_errors import JUMP, largest_growth, part_name
from gircse.evaluation.parity.report_schema import LayerJump, LayerReport
from gircse.reporting.files import markdown_table

COLUMNS = ("part", "first step", "steps", "error alone", "times the median")
SHOWN = 8
"""Parts in the table; all are in parity.json."""

LEGEND = (
    "error alone: of a part that is fed what the reference computes there, relative to what it adds to the residual "
    f"stream; named is what has {JUMP:g} times the median of the layers"
)


def layer_table(name: str, layers: LayerReport) -> Table:
    """Return the table of what stands out, with the summary below it."""
    table = Table(
        title=f"Where {name} departs: text {layers.text}, the one furthest from the reference",
        caption="\n".join(_summary(layers)),
        caption_justify="left",
        caption_style="",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        min_width=80,
        show_header=bool(layers.jumps),
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == COLUMNS[0] else "right")
    for row in _rows(layers.jumps):
        table.add_row(*row)
    return table


def layer_markdown(layers: LayerReport) -> list[str]:
    """Return the paragraphs of a report."""
    rows = _rows(layers.jumps)
    return [
        f"### Layers, text {layers.text}",
        *([markdown_table(COLUMNS, rows), f"{LEGEND}."] if rows else []),
        " ".join(f"{line}." for line in _summary(layers)),
    ]


def _rows(jumps: Sequence[LayerJump]) -> list[tuple[str, ...]]:
    """Return one row for each part, in the order in which the computation meets them."""
    rows: list[tuple[str, ...]] = []
    for name in list(dict.fromkeys(jump.part for jump in jumps))[:SHOWN]:
        of_part = [jump for jump in jumps if jump.part == name]
        worst = max(of_part, key=lambda jump: jump.error)
        rows.append((name, str(of_part[0].step), str(len(of_part)), f"{worst.error:.1e}", f"{worst.times:.0f}"))
    return rows


def _summary(layers: LayerReport) -> list[str]:
    alone, running = np.array(layers.alone), np.array(layers.running)
    parts = len({jump.part for jump in layers.jumps})
    step, part = np.unravel_index(alone[:, 1:-1].argmax(), alone[:, 1:-1].shape)
    found = "no part stands out" if not parts else f"{parts} of {alone.shape[1]} parts stand out"
    grown_step, grown = largest_growth(layers.running)
    before = running.ravel()[grown_step * running.shape[1] + grown - 1]
    name = part_name(grown_step, grown, layers=running.shape[1] - 2)
    return [
        f"{found}: errors of the layers alone have a median of {np.median(alone[:, 1:-1]):.1e}, the largest is "
        f"{alone[step, part + 1]:.1e} (step {step}, layer {part})",
        f"running freely, the error grows most at step {grown_step}, {name}: from {before:.1e} to "
        f"{running[grown_step, grown]:.1e}; at the end it is {running[-1, -1]:.1e}",
    ]
