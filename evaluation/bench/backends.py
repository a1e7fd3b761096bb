"""What a benchmark measures: a precision of a bundle, the PyTorch loop, llama.cpp.

A spec is sent to a separate process and opened there. ``open`` imports heavy packages itself, so that the process holds
only those of its own backend.
"""

import contextlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from gircse.checkpoint.source import ADAPTER_WEIGHTS, Checkpoint
from gircse.evaluation.bench.llama_cpp import BASELINE_ENVIRONMENT, CRASH_HINT
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import Float32, Int64, l2_normalize, pool_states
from gircse.runtime.precision import Precision
from gircse.runtime.provider import Provider

Run = Callable[[Int64, int], Float32]
"""Takes (batch, tokens) int64 ids of equal length and a number of steps, gives (batch, hidden) float32."""


class Baseline(StrEnum):
    """What bundles can be measured against."""

    TORCH = "torch"
    LLAMA_CPP = "llama.cpp"


class _Spec:
    """What a backend has unless it says otherwise.

    Attributes:
        libraries: imported before its load time is measured.
        environment: what its process is started with.
        crash_hint: what to do about a segmentation fault.
    """

    libraries: ClassVar[tuple[str, ...]] = ()
    environment: ClassVar[Mapping[str, str]] = {}
    crash_hint: ClassVar[str | None] = None

    def weight_bytes_read(self, steps: int) -> int | None:
        """Return the bytes of weights that the CPU reads in one run; None where that is not counted."""
        return None


@dataclass(frozen=True)
class BundleSpec(_Spec):
    """One precision of a bundle.

    Attributes:
        bundle: an opened bundle.
        precision: name of one of its variants.
        threads: threads of one run.
        layout: which of its graphs; None is the one that suits the provider.
        provider: where it runs.
        cached_instruction: how many tokens of every prompt are an instruction that is computed once; None runs whole
            prompts.
    """

    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    bundle: Bundle
    precision: str
    threads: int
    layout: Layout | None = None
    provider: Provider = Provider.CPU
    cached_instruction: int | None = None

    @property
    def name(self) -> str:
        """What it is, for reports."""
        cached = "" if self.cached_instruction is None else ", cached instruction"
        return f"{self.bundle.directory.name}:{self.precision}{_place(self.provider)}{cached}"

    def open(self) -> Run:
        """Load the graph or the engine."""
        from gircse.runtime import Embedder

        embedder = Embedder(
            self.bundle.directory,
            precision=self.precision,
            provider=self.provider,
            layout=self.layout,
            threads=self.threads,
            prefix_cache=True,
        )

        def run(input_ids: Int64, steps: int) -> Float32:
            outputs = embedder.run_batch(input_ids.tolist(), steps=steps, instruction_tokens=self.cached_instruction)
            return outputs.embedding

        return run

    def can_run(self, steps: int) -> bool:
        """Whether it can stop after so many steps; an unrolled graph always runs K."""
        most = self.bundle.manifest.graph.steps
        return steps == most or (self._layout_to_run is Layout.STEPWISE and steps < most)

    @property
    def takes_prefixes(self) -> bool:
        """Whether it can compute an instruction once."""
        return self._layout_to_run is Layout.STEPWISE and self.provider is not Provider.ORT_TENSORRT

    @property
    def _layout_to_run(self) -> Layout:
        return self.bundle.layout(self.precision, self.provider, self.layout)

    def model_bytes(self) -> int:
        """Return the size of the files that it loads."""
        manifest, variant = self.bundle.manifest, self.bundle.variant(self.precision)
        graph = variant.graphs[self._layout_to_run].path
        return manifest.weight_bytes(self.precision) + manifest.files[graph].bytes

    def weight_bytes_read(self, steps: int) -> int | None:
        """Return the bytes of weights that the CPU reads in one run; None on a GPU."""
        from gircse.evaluation.bench.roofline import weight_bytes_read

        if self.provider is not Provider.CPU:
            return None
        return weight_bytes_read(self.bundle, self.precision, layout=self.layout, steps=steps)


@dataclass(frozen=True)
class TorchSpec(_Spec):
    """The refinement loop in PyTorch.

    Attributes:
        bundle: gives pooling and temperature.
        checkpoint: the model that it was made of, see ``source_checkpoint``.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        threads: threads of one run.
        device: a torch device.
    """

    libraries: ClassVar[tuple[str, ...]] = ("torch", "peft", "transformers.models.auto.modeling_auto")

    bundle: Bundle
    checkpoint: Checkpoint
    precision: str
    threads: int
    device: str = "cpu"

    @property
    def name(self) -> str:
        """What it is, for reports."""
        return f"{Baseline.TORCH} {self.precision}{_place(self.device)}"

    def open(self) -> Run:
        """Load the model."""
        import torch

        from gircse.checkpoint.reference import load_reference, step_states

        torch.set_num_threads(self.threads)
        manifest = self.bundle.manifest
        model = load_reference(self.checkpoint, device=self.device, precision=Precision(self.precision))

        def run(input_ids: Int64, steps: int) -> Float32:
            ids = torch.from_numpy(input_ids).to(self.device)
            mask = torch.ones_like(ids)
            states = step_states(model, ids, mask, steps=steps, temperature=manifest.graph.temperature)
            return l2_normalize(pool_states(states.float().cpu().numpy(), manifest.graph.pooling)[:, -1])

        return run

    def can_run(self, steps: int) -> bool:
        """Whether it can stop after so many steps."""
        return steps >= 0

    def model_bytes(self) -> int:
        """Return the size of the checkpoint and of the adapter."""
        paths = [*self.checkpoint.shards]
        if self.checkpoint.adapter_directory is not None:
            paths.append(self.checkpoint.adapter_directory / ADAPTER_WEIGHTS)
        return sum(path.stat().st_size for path in paths)

    def memory_bytes(self) -> tuple[int, int]:
        """Return about how much memory the whole model needs: of the machine, and of the GPU where it runs on one."""
        from gircse.checkpoint.model_config import read_model_config
        from gircse.checkpoint.model_weights import ModelWeights
        from gircse.checkpoint.reference_choice import ReferenceBudget, ReferenceOptions

        config, steps = read_model_config(self.checkpoint.directory), self.bundle.manifest.graph.steps
        weights = ModelWeights.open(self.checkpoint, config, steps=steps, allow_partial_adapter=True)
        budget = ReferenceBudget.of(weights, config, ReferenceOptions(self.device, Precision(self.precision)))
        return budget.whole, 0 if budget.device is None else budget.whole_on_device


@dataclass(frozen=True)
class LlamaCppSpec(_Spec):
    """The refinement loop over llama.cpp, on the CPU.

    Attributes:
        bundle: gives pooling and temperature.
        checkpoint: the model that it was made of, see ``source_checkpoint``.
        gguf: the model's GGUF file.
        weights: what the file holds, for reports.
        threads: threads of one run.
        batch: largest batch of the benchmark.
        tokens: longest prompt.
        steps: largest number of steps.
    """

    libraries: ClassVar[tuple[str, ...]] = ("llama_cpp",)
    environment: ClassVar[Mapping[str, str]] = BASELINE_ENVIRONMENT
    crash_hint: ClassVar[str | None] = CRASH_HINT

    bundle: Bundle
    checkpoint: Checkpoint
    gguf: Path
    weights: str
    threads: int
    batch: int
    tokens: int
    steps: int

    @property
    def name(self) -> str:
        """What it is, for reports."""
        return f"{Baseline.LLAMA_CPP} {self.weights}"

    def open(self) -> Run:
        """Load the model, with room for the largest run."""
        from gircse.evaluation.bench.gguf import embedding_table
        from gircse.evaluation.bench.llama_cpp import LlamaCppBaseline

        manifest = self.bundle.manifest
        baseline = LlamaCppBaseline(
            self.gguf,
            embedding_table=embedding_table(self.checkpoint),
            batch=self.batch,
            tokens=self.tokens,
            steps=self.steps,
            threads=self.threads,
            temperature=manifest.graph.temperature,
            pooling=manifest.graph.pooling,
        )
        return lambda input_ids, steps: baseline.run(input_ids, steps=steps)

    def can_run(self, steps: int) -> bool:
        """Whether it can stop after so many steps; it takes at least one."""
        return steps > 0

    def model_bytes(self) -> int:
        """Return the size of the GGUF file."""
        return self.gguf.stat().st_size


BackendSpec = BundleSpec | TorchSpec | LlamaCppSpec


def import_libraries(spec: BackendSpec) -> None:
    """Import a backend's libraries, so that opening it loads the model only; ``open`` reports a missing one."""
    with contextlib.suppress(ImportError):
        for name in spec.libraries:
            importlib.import_module(name)


def _place(device: str) -> str:
    return "" if device == Provider.CPU else f" on {device}"
