"""One backend of a benchmark in its own process.

Thread pools of torch, ONNX Runtime, OpenBLAS and llama.cpp spin for a while when they are idle; in one process each
would take the cores of the next one. A process per backend also gives each its own load time and peak memory. The
parent decides whose turn it is, so the backends still run in turn.
"""

import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gircse.evaluation.bench.backends import BackendSpec, import_libraries
from gircse.evaluation.worker_process import WorkerProcess, WorkerSpec
from gircse.reporting.sizes import peak_memory
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
        hint = "Try a smaller batch, or leave this backend out."
        worker = WorkerSpec(spec.name, hint, environment=spec.environment, crash_hint=spec.crash_hint)
        self._process = WorkerProcess(worker, _serve, spec)
        try:
            self.load_s: float = self._process.receive()
        except BaseException:
            self._process.close(patience_s=0)
            raise

    def __enter__(self) -> Self:
        """Return the worker."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the process."""
        self._process.__exit__(kind, error, traceback)

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

    def _ask(self, request: Any) -> Any:
        self._process.send(request)
        return self._process.receive()


def _serve(connection: Connection, spec: BackendSpec) -> None:
    """Load the backend, then answer until the parent hangs up: ids and steps with a timed run, None with the peak."""
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


def _peak_bytes() -> int:
    """Return the peak of this process; ``ru_maxrss`` on Linux would count the parent's memory at the fork too."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_memory()
