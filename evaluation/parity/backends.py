"""The two kinds of backends that are compared: the PyTorch reference, and one precision of a bundle.

Both take token ids and sort them into the same batches of like length, so that nothing but the computation differs.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx_ir as ir

from gircse.checkpoint.available_memory import available_memory
from gircse.checkpoint.reference_choice import ReferenceOptions, open_reference
from gircse.checkpoint.source import Checkpoint
from gircse.evaluation.parity.batches import batch_tokens, side_batches
from gircse.evaluation.parity.emulation import emulated_graph
from gircse.evaluation.parity.engine_probe import EngineProbe, has_layer_engine, open_engine_probe
from gircse.evaluation.parity.graph_probe import GraphProbe, ProbedGraph
from gircse.evaluation.parity.layer_probe import LayerProbe
from gircse.evaluation.parity.layer_trace import LayerTrace, trace_torch_layers
from gircse.evaluation.parity.options import ParityOptions
from gircse.evaluation.parity.step_trace import StepTrace, StepValues, check_finite, collect_trace
from gircse.reporting.progress import Advance
from gircse.reporting.sizes import gib
from gircse.runtime import Embedder
from gircse.runtime.batch_planner import DEFAULT_BATCH_SIZE, TokenBatch
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import Float32, l2_normalize, pool_states
from gircse.runtime.ort_session import open_session
from gircse.runtime.precision import precision_spec, session_bytes
from gircse.runtime.provider import Provider
from gircse.runtime.tokenization import open_tokenizer

TokenIds = Sequence[list[int]]
Probe = TypeVar("Probe", GraphProbe, LayerProbe)


class Backend(Protocol):
    """Computes embeddings of token ids, and shows what it computes on the way."""

    @property
    def name(self) -> str:
        """What it is, for reports."""

    def embed_and_trace(
        self, token_ids: TokenIds, advance: Advance, *, more: TokenIds = ()
    ) -> tuple[Float32, StepTrace]:
        """Return z_0..z_K and what is computed on the way.

        Args:
            token_ids: token ids of each text.
            advance: told how many texts were just done.
            more: further texts, of which the embeddings are enough.

        Returns:
            (n, K + 1, hidden) float32 of all texts, where z_0 is the normalized prompt state, and the trace of the
            first ones.
        """


class TorchBackend:
    """The reference loop in PyTorch, on the checkpoint that a bundle was exported from."""

    def __init__(
        self, bundle: Bundle, checkpoint: Checkpoint, options: ReferenceOptions, *, threads: int | None
    ) -> None:
        """Load the model, or get ready to stream it.

        Args:
            bundle: gives K, pooling and temperature.
            checkpoint: the model and adapter, see ``source_checkpoint``.
            options: where and how it runs.
            threads: threads on the CPU; None leaves it to torch.

        Raises:
            CheckpointError: it cannot be loaded, or not even one layer of it fits into the memory.
            OptionError: torch cannot use the device.
        """
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self._manifest, self._tokens = bundle.manifest, token_count(bundle)
        self._reference = open_reference(checkpoint, options, steps=bundle.manifest.graph.steps)
        self.name = f"PyTorch {options.dtype} on {options.device}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen and why, a line each."""
        return self._reference.notes

    def estimate_seconds(self, *token_ids: TokenIds) -> float | None:
        """Return how long texts will take; None where nobody can know."""
        batches = [batch for ids in token_ids for batch in self._batches(ids)]
        return self._reference.estimate_seconds(batches, steps=self._manifest.graph.steps)

    def embed_and_trace(
        self, token_ids: TokenIds, advance: Advance, *, more: TokenIds = ()
    ) -> tuple[Float32, StepTrace]:
        """Return z_0..z_K (n, K + 1, hidden) float32 of all texts, and the trace of the first ones."""
        facts, texts = self._manifest.graph, len(token_ids)
        # In one stream: a model that does not fit in memory is read once a step, however many texts there are.
        batches = [*self._batches(token_ids), *self._batches(more, first_row=texts)]
        values = self._refine(batches, advance)
        trace = collect_trace(self.name, values, facts, texts=texts + len(more), traced=texts, tokens=self._tokens)
        vectors = l2_normalize(pool_states(trace.states, facts.pooling))
        return vectors, dataclasses.replace(trace, states=trace.states[:texts])

    def trace_layers(self, token_ids: list[int]) -> LayerTrace:
        """Return what the layers pass on, of one text."""
        (batch,) = self._batches([token_ids])
        return trace_torch_layers(self._reference, batch, self._manifest.graph)

    def _batches(self, token_ids: TokenIds, *, first_row: int = 0) -> Iterator[TokenBatch]:
        for batch in side_batches(token_ids, self._manifest):
            yield dataclasses.replace(batch, rows=tuple(first_row + row for row in batch.rows))

    def _refine(self, batches: Sequence[TokenBatch], advance: Advance) -> Iterator[StepValues]:
        facts = self._manifest.graph
        for state in self._reference.refine(batches, steps=facts.steps, temperature=facts.temperature, advance=advance):
            arrays = (_numpy(state.hidden), _numpy(state.soft_token), _numpy(state.probabilities))
            yield StepValues(list(batches[state.batch].rows), state.step, *arrays)


class BundleBackend:
    """One precision of a bundle: embeddings from the runtime itself, the rest from a probe of the same graphs."""

    def __init__(
        self,
        bundle: Bundle,
        precision: str,
        *,
        layout: Layout | None = None,
        provider: Provider = Provider.CPU,
        threads: int | None = None,
    ) -> None:
        """Load nothing yet: the runtime and the probe are opened when they are needed, and dropped afterwards.

        Args:
            bundle: an opened bundle.
            precision: name of one of its variants. On the CPU, FP16 and BF16 are emulated.
            layout: which of its graphs; None is the one that suits the provider.
            provider: where the runtime runs. The probes run there too if it is ``cuda``, else, as an engine shows no
                inner values unless it was built to, on the CPU.
            threads: threads of one run; None lets ONNX Runtime take the physical cores.
        """
        self._emulated = precision_spec(precision).emulated and provider is Provider.CPU
        place = ", emulated" if self._emulated else "" if provider is Provider.CPU else f" on {provider}"
        self.name = f"{bundle.directory.name}:{precision}{place}"
        self._bundle, self._precision, self._layout = bundle, precision, layout
        self._provider, self._threads = provider, threads
        self._probe_provider = provider if provider is Provider.CUDA else Provider.CPU
        self._facts, self._tokens = bundle.manifest.graph, token_count(bundle)

    @functools.cached_property
    def memory_note(self) -> str | None:
        """Why weights stay in their file, which is slower; None where copies of them fit in memory."""
        weights = self._bundle.manifest.weight_bytes(self._precision)
        embeddings = self._facts.vocab_size * self._facts.hidden_size
        needed = session_bytes(self._precision, weights=weights, embeddings=embeddings)
        if self._probe_provider is not Provider.CPU or (free := available_memory()) >= needed:
            return None
        return (
            f"a session with copies of the weights needs {gib(needed)} of memory, {gib(free)} are available: they stay "
            "in their file, which is slower"
        )

    def open_embedder(self) -> Embedder:
        """Load the runtime."""
        if self._provider is not Provider.CPU or not (self._emulated or self.memory_note):
            return Embedder(
                self._bundle.directory,
                precision=self._precision,
                provider=self._provider,
                layout=self._layout,
                threads=self._threads,
                prefix_cache=True,
            )
        layout = self._bundle.layout(self._precision, self._provider, self._layout)
        copy_weights, content = self.memory_note is None, None
        if self._emulated:
            graph = emulated_graph(self._bundle.graph(self._precision, layout), copy_weights=copy_weights)
            content = ir.to_proto(graph).SerializeToString()
        session = open_session(
            self._bundle,
            self._precision,
            layout=layout,
            threads=self._threads,
            content=content,
            copy_weights=copy_weights,
        )
        return Embedder.from_session(self._bundle, session, precision=self._precision)

    def embed(self, token_ids: TokenIds, advance: Advance) -> Float32:
        """Return z_0..z_K (n, K + 1, hidden) float32."""
        return self.embed_with(self.open_embedder(), token_ids, advance)

    def embed_with(
        self,
        embedder: Embedder,
        token_ids: TokenIds,
        advance: Advance,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        instruction_tokens: int | None = None,
    ) -> Float32:
        """Return z_0..z_K (n, K + 1, hidden) float32 of an embedder that is open already.

        Args:
            embedder: of this backend.
            token_ids: token ids of each text.
            advance: told how many texts were just done.
            batch_size: maximum texts per batch.
            instruction_tokens: see ``Embedder.run_batches``.
        """
        result = np.empty((len(token_ids), self._facts.steps + 1, self._facts.hidden_size), np.float32)
        for rows, outputs in embedder.run_batches(
            token_ids,
            batch_size=batch_size,
            batch_tokens=batch_tokens(self._facts),
            instruction_tokens=instruction_tokens,
        ):
            result[list(rows), 0] = outputs.prompt_embedding
            result[list(rows), 1:] = outputs.step_embeddings
            advance(len(rows))
        check_finite(self.name, "embedding z", result, first_step=0)
        return result

    def embed_and_trace(
        self, token_ids: TokenIds, advance: Advance, *, more: TokenIds = ()
    ) -> tuple[Float32, StepTrace]:
        """Return z_0..z_K (n, K + 1, hidden) float32 of all texts, from the runtime, and a probe's trace of the first.

        The texts are counted when they are embedded, not once more when they are traced.
        """
        embedder = self.open_embedder()
        vectors = self.embed_with(embedder, token_ids, advance)
        if more:
            vectors = np.concatenate([vectors, self.embed_with(embedder, more, advance)])
        del embedder  # its weights, before the probe loads them again
        return vectors, self._trace(self._open_inside(GraphProbe), token_ids, advance=lambda _: None)

    def trace_and_force(self, token_ids: TokenIds, soft_tokens: Float32, advance: Advance) -> tuple[StepTrace, Float32]:
        """Return what is computed on the way, and the states when every step is fed another backend's soft tokens.

        Args:
            token_ids: token ids of each text.
            soft_tokens: (n, K, hidden) float32 of the other backend.
            advance: told how many texts were just done; each is counted twice.

        Returns:
            The free-running trace, and the teacher-forced states (n, K + 1, hidden) float32.
        """
        probe = self._open_inside(GraphProbe)
        trace = self._trace(probe, token_ids, advance)
        values = probe.refine(token_ids, forced=soft_tokens, advance=advance)
        name, texts = f"{self.name}, teacher-forced", len(token_ids)
        forced = collect_trace(name, values, self._facts, texts=texts, traced=0, tokens=self._tokens)
        return trace, forced.states

    @functools.cached_property
    def layers_in_engine(self) -> bool:
        """Whether there is an engine that shows the values between its layers."""
        return has_layer_engine(self._bundle, self._precision, self._provider, self._layout)

    def open_layer_probe(self) -> LayerProbe | EngineProbe:
        """Load the engine that shows the values between its layers if there is one, else the graph, opened there.

        Raises:
            GircseError: that fails.
        """
        if self.layers_in_engine:
            return open_engine_probe(self._bundle, self._precision, self._provider)
        return self._open_inside(LayerProbe)

    def _open_inside(self, probe: type[Probe]) -> Probe:
        return probe(
            ProbedGraph(
                self._bundle,
                self._precision,
                layout=self._layout,
                provider=self._probe_provider,
                threads=self._threads,
                copy_weights=self.memory_note is None,
            )
        )

    def _trace(self, probe: GraphProbe, token_ids: TokenIds, advance: Advance) -> StepTrace:
        values, texts = probe.refine(token_ids, advance=advance), len(token_ids)
        return collect_trace(self.name, values, self._facts, texts=texts, traced=texts, tokens=self._tokens)


def candidate_backend(options: ParityOptions, bundle: Bundle, precision: str) -> BundleBackend:
    """Return the backend of a variant that is compared."""
    return BundleBackend(bundle, precision, layout=options.layout, provider=options.provider, threads=options.threads)


def token_count(bundle: Bundle) -> int:
    """Return the number of vocabulary rows that belong to a token; the rows after them are padding."""
    vocabulary = open_tokenizer(bundle).tokenizer.get_vocab()
    return max(*vocabulary.values(), bundle.manifest.pad_token_id) + 1


def _numpy(tensor: Any) -> Any:
    return None if tensor is None else tensor.float().cpu().numpy()
