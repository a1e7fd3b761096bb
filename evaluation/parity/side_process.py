"""Compute one side of a comparison in a process of its own, so that the peak is the larger side and not the sum.

What the side computes comes back through files: arrays are mapped, not read, so they take memory only while they are
compared.
"""

import contextlib
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np

from gircse.evaluation.worker_process import WorkerProcess, WorkerSpec
from gircse.reporting.progress import Advance, StageProgress, Unit
from gircse.runtime.errors import OutputError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

HINT = "Use a machine with more memory, --reference-memory, or fewer texts."


class _StageStart(NamedTuple):
    title: str
    total: float | None
    unit: Unit


class _StageEnd(NamedTuple):
    pass


class _Advanced(NamedTuple):
    amount: float


class _Note(NamedTuple):
    text: str


class _Done(NamedTuple):
    pass


def run_side(
    name: str,
    folder: Path,
    progress: StageProgress,
    compute: Callable[Concatenate[StageProgress, Arguments], Result],
    /,
    *arguments: Arguments.args,
    **keywords: Arguments.kwargs,
) -> Result:
    """Call a function in a process that ends with it.

    Args:
        name: of the side, for errors.
        folder: where its result is kept; arrays in it are mapped.
        progress: where its stages are shown.
        compute: gets a progress display and the arguments; picklable, as they are.
        arguments: of the function.
        keywords: of the function.

    Returns:
        What the function returned.

    Raises:
        Exception: the function raised it.
        MeasurementError: the process died.
        OutputError: the disk is full.
    """
    folder.mkdir()
    spec = WorkerSpec(name, HINT)
    with WorkerProcess(spec, _serve, folder, compute, arguments, keywords) as process, ExitStack() as stage:
        advance: Advance | None = None
        while True:
            message = process.receive()
            match message:
                case _StageStart(title, total, unit):
                    advance = stage.enter_context(progress.stage(title, total=total, unit=unit))
                case _Advanced(amount) if advance is not None:
                    advance(amount)
                case _StageEnd():
                    stage.close()
                case _Note(text):
                    progress.note(text)
                case _Done():
                    break
    result: Result = load_result(folder)
    return result


def load_result(folder: Path) -> Any:
    """Return what a side has computed; its arrays are mapped from the files, and stay when those are removed."""
    with (folder / "result").open("rb") as file:
        sizes, content = pickle.load(file)
    buffers = [np.memmap(folder / str(at), np.uint8, "r") if size else b"" for at, size in enumerate(sizes)]
    return pickle.loads(content, buffers=buffers)


def _save_result(result: Any, folder: Path) -> None:
    """Write an object, its arrays in files of their own: they are what pickle's protocol 5 keeps out of its stream."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
    try:
        for at, buffer in enumerate(buffers):
            (folder / str(at)).write_bytes(buffer.raw())
        (folder / "result").write_bytes(pickle.dumps(([buffer.raw().nbytes for buffer in buffers], content)))
    except OSError as err:
        raise OutputError(
            str(folder), f"cannot be written: {err.strerror}", None, "Free some space, or name another disk by TMPDIR."
        ) from err


def _serve(
    connection: Connection,
    folder: Path,
    compute: Callable[..., Any],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
) -> None:
    _save_result(compute(_SentProgress(connection), *arguments, **keywords), folder)
    connection.send(_Done())


class _SentProgress(StageProgress):
    """Sends what is to be shown to the process that shows it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @contextlib.contextmanager
    def stage(self, title: str, *, total: float | None = None, unit: Unit = Unit.WORK) -> Iterator[Advance]:
        """Let the other process show a stage while the block runs; an error ends it there."""
        self._connection.send(_StageStart(title, total, unit))
        yield lambda amount: self._connection.send(_Advanced(amount))
        self._connection.send(_StageEnd())

    def note(self, text: str) -> None:
        """Let the other process print a line."""
        self._connection.send(_Note(text))
