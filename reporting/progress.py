"""Progress of a long command on stderr: a live bar on a terminal, one line per stage elsewhere."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from enum import StrEnum

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Advance = Callable[[float], None]


class Unit(StrEnum):
    """What the amounts of a stage count; the speed of bytes is shown."""

    WORK = "work"
    BYTES = "bytes"


class _StderrConsole(Console):
    """A console on stderr that goes quiet when its pipe is closed: without a reader of its progress, work goes on."""

    def __init__(self) -> None:
        super().__init__(stderr=True, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Write to nowhere from now on; rich would end the command with 1."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class StageProgress:
    """Shows the stages of a long job, one at a time."""

    def __init__(self) -> None:
        self._console = _StderrConsole()

    @contextlib.contextmanager
    def stage(self, title: str, *, total: float | None = None, unit: Unit = Unit.WORK) -> Iterator[Advance]:
        """Show one stage while the block runs; its line stays afterwards, with the time that it took.

        Args:
            title: what is being done.
            total: amount of work, for a bar with an estimate; None shows a spinner.
            unit: what is counted.

        Yields:
            A function that takes the amount of work just done.
        """
        start = time.perf_counter()
        if not self._console.is_terminal:
            yield lambda amount: None
            self._console.print(f"✓ {title} {_taken(start, total, unit)}", highlight=False, markup=False)
            return
        bar = [BarColumn(bar_width=24), TimeRemainingColumn()] if total is not None else []
        speed = [TransferSpeedColumn()] if unit is Unit.BYTES else []
        columns = (SpinnerColumn(), TextColumn("{task.description}"), *bar, *speed, TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(escape(title), total=total)
            yield lambda amount: progress.advance(task, amount)
        self._console.print(f"[green]✓[/] {escape(title)} [dim]{_taken(start, total, unit)}[/]", highlight=False)

    def note(self, text: str) -> None:
        """Print one line between stages."""
        self._console.print(text, highlight=False, markup=False)


def _taken(start: float, total: float | None, unit: Unit) -> str:
    seconds = time.perf_counter() - start
    speed = f" ({total / seconds / 1e6:.0f} MB/s)" if unit is Unit.BYTES and total is not None else ""
    return f"{seconds:.1f} s{speed}"
