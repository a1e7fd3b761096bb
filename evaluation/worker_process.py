"""One side of a measurement in a process of its own.

Its memory, its threads and its GPU are its own, and are free again when it ends. The processes are spawned, so a script
that measures needs ``if __name__ == "__main__":``.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from gircse.runtime.errors import GircseError, MeasurementError


@dataclass(frozen=True)
class WorkerSpec:
    """What a process is.

    Attributes:
        name: for errors.
        hint: what to do where it is killed, most likely for want of memory.
        environment: variables that it is started with, besides those of this process.
        crash_hint: what to do about a segmentation fault.
    """

    name: str
    hint: str
    environment: Mapping[str, str] = field(default_factory=dict)
    crash_hint: str | None = None


class WorkerProcess:
    """A process that serves one function over a pipe; a context manager that ends it."""

    def __init__(self, spec: WorkerSpec, serve: Callable[..., None], *arguments: Any) -> None:
        """Start it.

        Args:
            spec: what it is.
            serve: called there with its end of the pipe and the arguments, until it returns or the pipe is closed.
            arguments: picklable, as ``serve`` is.
        """
        self._spec = spec
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, serve, arguments), daemon=True)
        with _environment(spec.environment), _interrupts_blocked():
            self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        """Return the process."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the process; at once if the block failed."""
        self.close(patience_s=10 if kind is None else 0)

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid or 0

    def send(self, message: Any) -> None:
        """Send a message; a dead process shows when it does not answer."""
        with contextlib.suppress(OSError):
            self._connection.send(message)

    def receive(self) -> Any:
        """Wait for the next message.

        Raises:
            Exception: the function raised it.
            MeasurementError: the process died.
        """
        try:
            message = self._connection.recv()
        except (EOFError, OSError) as err:
            self._process.join(timeout=10)
            raise self._death(self._process.exitcode) from err
        if isinstance(message, MemoryError):
            raise MeasurementError(f"the process of {self._spec.name}", "ran out of memory", None, self._spec.hint)
        if isinstance(message, BaseException):
            raise message
        return message

    def close(self, *, patience_s: float = 10) -> None:
        """Hang up, and end the process if it does not end by itself."""
        self._connection.close()
        self._process.join(timeout=patience_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _death(self, code: int | None) -> MeasurementError:
        process = f"the process of {self._spec.name}"
        if code is None or code >= 0:
            return MeasurementError(process, f"ended with code {code}", None, "What it printed above may say why.")
        hint = self._spec.crash_hint if -code == signal.SIGSEGV else f"Most likely memory ran out. {self._spec.hint}"
        return MeasurementError(process, f"was killed by {signal.Signals(-code).name}", None, hint)


def _run(connection: Connection, serve: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Serve; errors that have a message of their own travel to the parent, all others are printed here."""
    try:
        serve(connection, *arguments)
    except (EOFError, ConnectionError):  # the parent has hung up
        return
    except (GircseError, ValueError, ImportError, OSError, MemoryError) as err:
        with contextlib.suppress(ConnectionError):
            connection.send(err)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start a process that never sees a Ctrl-C, which a terminal sends to both: the parent ends it.

    What is blocked here stays blocked there; here it only waits until the process has started. Another thread of this
    process may still take the signal, so its handler waits too.
    """
    resource_tracker.ensure_running()  # which unblocks it when it starts
    is_main = threading.current_thread() is threading.main_thread()  # no other one has handlers
    arrived: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: arrived.append(number)) if is_main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if is_main:
            signal.signal(signal.SIGINT, handler)
    if arrived:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Change the environment that a process is started with; libraries read it when they load."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
