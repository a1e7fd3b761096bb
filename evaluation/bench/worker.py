"""One side of a benchmark in a process of its own.

Thread pools of torch, ONNX Runtime, OpenBLAS and llama.cpp spin for a while when they are idle; in one process each
would take the cores of the next one. A process per side also gives each its own load time and peak memory. The parent
decides whose turn it is, so the sides run in turn all the same.
"""

import contextlib
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gircse.evaluation.bench.llama_cpp import BASELINE_ENVIRONMENT, CRASH_HINT
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import GircseError, MeasurementError
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import Float32, l2_normalize, pool_states
from gircse.runtime.precision import Precision
from gircse.runtime.provider import Provider

Int64 = NDArray[np.int64]
Run = Callable[[Int64, int], Float32]
"""Takes (batch, tokens) int64 ids of equal length and a number of steps, gives (batch, hidden) float32."""


class Kind(StrEnum):
    """Who computes."""

    BUNDLE = "bundle"
    TORCH = "torch"
    LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True)
class BackendSpec:
    """What a worker loads.

    Attributes:
        name: for reports.
        kind: who computes.
        bundle: the bundle, which also tells the peers K, pooling and checkpoint.
        precision: of the bundle, or of the peer.
        threads: threads of one run.
        batch: largest batch it will see.
        tokens: longest prompt it will see.
        steps: most steps it will see.
        gguf: model file of llama.cpp.
    """

    name: str
    kind: Kind
    bundle: Path
    precision: str
    threads: int
    batch: int
    tokens: int
    steps: int
    layout: Layout | None = None
    provider: Provider = Provider.CPU
    device: str = "cpu"
    gguf: Path | None = None


class Worker:
    """A side that is loaded and waits for its turn; a context manager."""

    def __init__(self, spec: BackendSpec) -> None:
        """Start the process and load the side.

        Raises:
            GircseError: what the side raises while it loads.
            MeasurementError: the process died.
        """
        self.spec = spec
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
        with _environment(BASELINE_ENVIRONMENT if spec.kind is Kind.LLAMA_CPP else {}):
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
            GircseError: what the side raises.
            MeasurementError: the process died.
        """
        seconds, vectors = self._ask((input_ids, steps))
        return seconds, vectors

    def peak_bytes(self) -> int:
        """Return the most memory that the process has held at once."""
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
            crashed = self.spec.kind is Kind.LLAMA_CPP and self._process.exitcode == -signal.SIGSEGV
            advice = CRASH_HINT if crashed else "out of memory? try a smaller batch, or leave this side out"
            raise MeasurementError(
                f"{self.spec.name}: its process ended with code {self._process.exitcode} | a run to its end | {advice}"
            ) from err
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(connection: Connection, spec: BackendSpec) -> None:
    """Load the side, then answer until the parent hangs up: ids and steps by a timed run, None by the peak memory."""
    try:
        _import(spec.kind)
        start = time.perf_counter()
        run = _open(spec)
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


_LIBRARIES = {
    Kind.BUNDLE: ("onnxruntime",),
    Kind.TORCH: ("torch", "peft", "transformers.models.auto.modeling_auto"),
    Kind.LLAMA_CPP: ("llama_cpp",),
}


def _import(kind: Kind) -> None:
    """Import the libraries beforehand: load time is that of the model. A missing one is reported by who needs it."""
    with contextlib.suppress(ImportError):
        for name in _LIBRARIES[kind]:
            importlib.import_module(name)


def _open(spec: BackendSpec) -> Run:
    openers = {Kind.BUNDLE: _open_bundle, Kind.TORCH: _open_torch, Kind.LLAMA_CPP: _open_llama_cpp}
    return openers[spec.kind](spec)


def _open_bundle(spec: BackendSpec) -> Run:
    from gircse.runtime import Embedder

    embedder = Embedder(
        spec.bundle, precision=spec.precision, provider=spec.provider, layout=spec.layout, threads=spec.threads
    )

    def run(input_ids: Int64, steps: int) -> Float32:
        whole = {"batch_size": len(input_ids), "batch_tokens": input_ids.size}
        ((_, outputs),) = embedder.run_batches(input_ids.tolist(), steps=steps, **whole)
        return outputs.step_embeddings[:, -1] if steps else outputs.prompt_embedding

    return run


def _open_torch(spec: BackendSpec) -> Run:
    import torch

    from gircse.checkpoint.reference import load_reference, step_states
    from gircse.evaluation.parity.backends import source_checkpoint

    torch.set_num_threads(spec.threads)
    manifest = Bundle.open(spec.bundle).manifest
    model = load_reference(source_checkpoint(manifest), device=spec.device, precision=Precision(spec.precision))

    def run(input_ids: Int64, steps: int) -> Float32:
        ids = torch.from_numpy(input_ids).to(spec.device)
        mask = torch.ones_like(ids)
        states = step_states(model, ids, mask, steps=steps, temperature=manifest.graph.temperature)
        return l2_normalize(pool_states(states.float().cpu().numpy(), manifest.graph.pooling)[:, -1])

    return run


def _open_llama_cpp(spec: BackendSpec) -> Run:
    from gircse.evaluation.bench.gguf import embedding_table
    from gircse.evaluation.bench.llama_cpp import LlamaCppBaseline
    from gircse.evaluation.parity.backends import source_checkpoint

    if spec.gguf is None:
        raise ValueError(f"{spec.name}: no GGUF file | the model of llama.cpp | pass --gguf FILE")
    manifest = Bundle.open(spec.bundle).manifest
    peer = LlamaCppBaseline(
        spec.gguf,
        embedding_table=embedding_table(source_checkpoint(manifest)),
        batch=spec.batch,
        tokens=spec.tokens,
        steps=spec.steps,
        threads=spec.threads,
        temperature=manifest.graph.temperature,
        pooling=manifest.graph.pooling,
    )
    return lambda input_ids, steps: peer.run(input_ids, steps=steps)


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
