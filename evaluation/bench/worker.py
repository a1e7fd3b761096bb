"""One backend of a benchmark in its own process.

Thread pools of torch, ONNX Runtime, OpenBLAS and llama.cpp spin for a while when they are idle; in one process each
would take the cores of the next one. A process per backend also gives each its own load time and peak memory. The
parent decides whose turn it is, so the backends still run in turn.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from gircse.evaluation.bench.backends import BackendSpec, import_libraries
from gircse.reporting.sizes import peak_memory
from gircse.runtime.errors import GircseError, MeasurementError
from gircse.runtime.numerics import Float32, Int64


class Worker:
    """A backend that is loaded and waits for its turn; a context manager."""

    def __init__(self, spec: BackendSpec) -> None:
        """Start the process and load the backend.

        Raises:
            GircseError: what the backend raises while it loads.
            MeasurementError: the process died.
        """
        self.spec = spec
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
        with _environment(spec.environment):
            self._process.start()
        theirs.close()
        try:
            self.load_s: float = self._receive()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Return the worker."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()

    def run(self, input_ids: Int64, steps: int) -> tuple[float, Float32]:
        """Embed (batch, tokens) ids of equal length; return the seconds and the vectors (batch, hidden).

        Raises:
            GircseError: what the backend raises.
            MeasurementError: the process died.
        """
        seconds, vectors = self._ask((input_ids, steps))
        return seconds, vectors

    def peak_bytes(self) -> int:
        """Return the peak memory of the process."""
        peak: int = self._ask(None)
        return peak

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, request: Any) -> Any:
        with contextlib.suppress(OSError):  # a dead process shows when it does not answer
            self._connection.send(request)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as err:
            self._process.join(timeout=10)
            code = self._process.exitcode
            hint = self.spec.crash_hint if code == -signal.SIGSEGV else None
            raise MeasurementError(
                f"the process of {self.spec.name}",
                f"ended with code {code}",
                None,
                hint or "If memory ran out, try a smaller batch, or leave this backend out.",
            ) from err
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(connection: Connection, spec: BackendSpec) -> None:
    """Load the backend, then answer until the parent hangs up: ids and steps with a timed run, None with the peak."""
    try:
        import_libraries(spec)
        start = time.perf_counter()
        run = spec.open()
        connection.send(time.perf_counter() - start)
        while True:
            request = connection.recv()
            if request is None:
                connection.send(_peak_bytes())
                continue
            start = time.perf_counter()
            vectors = run(*request)
            connection.send((time.perf_counter() - start, vectors))
    except EOFError:
        return
    except (GircseError, ValueError, ImportError) as err:
        connection.send(err)


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


def _peak_bytes() -> int:
    """Return the peak of this process; ``ru_maxrss`` on Linux would count the parent's memory at the fork too."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_memory()
