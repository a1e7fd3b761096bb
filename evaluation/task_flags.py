"""What ``gircse-parity`` and ``gircse-bench`` share: their packages, the flags of the tasks, tables on the terminal."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gircse.runtime.command import write_stdout

EXTRAS = "cpu,evaluation,export,demo"
"""What to install: export and demo are for the PyTorch reference."""

_TASKS = (
    ("sts", "FILE", "scored pairs, TSV: score, sentence1, sentence2"),
    ("retrieval", "DIR", "BEIR layout: corpus.jsonl, queries.jsonl, qrels/test.tsv"),
    ("classification", "FILE", "labeled texts, TSV: label, text; scored by the nearest other text"),
)


def add_task_flags(parser: Any) -> None:
    """Add a flag for each task, and one for its instruction, to a parser or to a group of one."""
    for name, metavar, meaning in _TASKS:
        parser.add_argument(f"--{name}", type=Path, metavar=metavar, help=meaning)
    for name, _, _ in _TASKS:
        # No default here: the one in TaskOptions stays in force.
        parser.add_argument(
            f"--{name}-instruction", default=argparse.SUPPRESS, metavar="I", help=f"for the texts of --{name}"
        )


def pop_task_options(args: dict[str, Any]) -> Any:
    """Remove the task flags from parsed arguments and return them as ``TaskOptions``."""
    from gircse.evaluation.tasks.files import TaskOptions

    names = [key for name, _, _ in _TASKS for key in (name, f"{name}_instruction") if key in args]
    return TaskOptions(**{name: args.pop(name) for name in names})


def show_tables(tables: Iterable[Any], *, width: int) -> None:
    """Print ``rich`` tables; to a file or a pipe, which has no width, ``width`` columns wide."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=width)
    with console.capture() as capture:  # on its own, rich ends the command where a pipe is closed
        for table in tables:
            console.print(table)
    write_stdout([capture.get()])
