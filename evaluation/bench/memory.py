"""Whether the backends of a benchmark fit in memory; all of them are loaded while they run in turn."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from gircse.checkpoint.available_memory import available_memory
from gircse.evaluation.bench.backends import BackendSpec, BundleSpec, TorchSpec
from gircse.reporting.sizes import gib
from gircse.runtime.errors import MeasurementError
from gircse.runtime.precision import SESSION_BYTES, session_bytes
from gircse.runtime.provider import Provider

CUDA_BYTES = 1 << 30
"""A CUDA context with its libraries, and the activations of one batch."""


@dataclass(frozen=True)
class MemoryNeed:
    """What one backend needs, in bytes.

    Attributes:
        name: of the backend.
        weights: size of its files.
        host: main memory.
        device: memory of the GPU.
    """

    name: str
    weights: int
    host: int
    device: int = 0


def check_memory(specs: Sequence[BackendSpec]) -> None:
    """Refuse backends that do not fit.

    Raises:
        MeasurementError: main memory or that of the GPU is too small; names every backend with what it needs.
    """
    needs = [memory_need(spec) for spec in specs]
    _compare("memory", needs, [need.host for need in needs], available_memory())
    if any(need.device for need in needs):
        _compare("GPU memory", needs, [need.device for need in needs], free_gpu_memory())


def memory_need(spec: BackendSpec) -> MemoryNeed:
    """Estimate what a backend needs."""
    weights = spec.model_bytes()
    facts = spec.bundle.manifest.graph
    embeddings = facts.vocab_size * facts.hidden_size
    if isinstance(spec, TorchSpec):
        host, device = spec.memory_bytes()
        return MemoryNeed(spec.name, weights, host, device)
    if not isinstance(spec, BundleSpec):  # llama.cpp maps its file; soft tokens are mixed with a table of their own
        return MemoryNeed(spec.name, weights, SESSION_BYTES + weights + 4 * embeddings)
    if spec.provider is not Provider.CPU:
        return MemoryNeed(spec.name, weights, SESSION_BYTES, CUDA_BYTES + weights)
    return MemoryNeed(spec.name, weights, session_bytes(spec.precision, weights=weights, embeddings=embeddings))


def free_gpu_memory() -> int | None:
    """Return the free memory of the first GPU in bytes; None where NVIDIA's driver does not tell."""
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return int(subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _compare(what: str, needs: Sequence[MemoryNeed], needed: Sequence[int], free: int | None) -> None:
    if free is None or sum(needed) <= free:
        return
    sides = [
        f"{need.name} about {gib(size)} (weights {gib(need.weights)})"
        for need, size in zip(needs, needed, strict=True)
        if size
    ]
    together = f"{gib(sum(needed))} together: " if len(sides) > 1 else ""
    raise MeasurementError(
        "the benchmark",
        f"needs {together}{', '.join(sides)} of {what}",
        f"{gib(free)} is available",
        "Leave a backend or a precision out, measure them one by one, or use a larger machine.",
    )
