"""ONNX Runtime sessions for both layouts. Safe to call from several threads: a run keeps all its state local."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gircse.runtime import io_spec
from gircse.runtime.bundle import Bundle, Layout, Pooling
from gircse.runtime.errors import BundleError, ProviderError
from gircse.runtime.numerics import Float32, l2_normalize, prefix_means

Int64 = NDArray[np.int64]


class StepOutputs(NamedTuple):
    """What one run yields.

    Attributes:
        prompt_embedding: (batch, hidden) float32, h_0 normalised.
        step_embeddings: (batch, steps, hidden) float32, z_1..z_steps.
    """

    prompt_embedding: Float32
    step_embeddings: Float32


class Session(Protocol):
    """Runs a batch of prompts through the prompt pass and the first ``steps`` refinement steps."""

    def run(self, input_ids: Int64, attention_mask: Int64, *, steps: int) -> StepOutputs:
        """Embed one batch; (batch, tokens) int64 each."""


class UnrolledSession:
    """One graph with all K steps; a run costs K steps whatever ``steps`` asks for."""

    def __init__(self, graph: Any) -> None:
        """Take an ``onnxruntime.InferenceSession`` of the unrolled graph."""
        self._graph = graph
        self._outputs = [output.name for output in graph.get_outputs() if output.name != io_spec.EMBEDDING]

    def run(self, input_ids: Int64, attention_mask: Int64, *, steps: int) -> StepOutputs:
        """Embed one batch; (batch, tokens) int64 each."""
        values = self._graph.run(self._outputs, {io_spec.INPUT_IDS: input_ids, io_spec.ATTENTION_MASK: attention_mask})
        outputs = dict(zip(self._outputs, values, strict=True))
        prompt = outputs[io_spec.PROMPT_EMBEDDING]
        nothing = np.empty((len(prompt), 0, prompt.shape[1]), np.float32)
        return StepOutputs(prompt, outputs.get(io_spec.STEP_EMBEDDINGS, nothing)[:, :steps])


class StepwiseSession:
    """A prefill graph and a step graph; a run costs just the steps it is asked for."""

    def __init__(self, prefill: Any, step: Any, *, num_layers: int, pooling: Pooling) -> None:
        """Take the ``onnxruntime.InferenceSession`` of both graphs; ``step`` may be None when K = 0."""
        self._prefill, self._step, self._pooling = prefill, step, pooling
        self._past = io_spec.cache_names("past", num_layers)
        self._present = io_spec.cache_names("present", num_layers)

    def run(self, input_ids: Int64, attention_mask: Int64, *, steps: int) -> StepOutputs:
        """Embed one batch; (batch, tokens) int64 each. The KV cache stays in ONNX Runtime's own buffers."""
        from onnxruntime import OrtValue

        ids, mask = OrtValue.ortvalue_from_numpy(input_ids), OrtValue.ortvalue_from_numpy(attention_mask)
        hidden, *cache = self._prefill.run_with_ort_values(
            [io_spec.HIDDEN, *(self._present if steps else [])],
            {io_spec.INPUT_IDS: ids, io_spec.ATTENTION_MASK: mask},
        )
        prompt = l2_normalize(hidden.numpy())
        states = np.empty((len(prompt), steps, prompt.shape[1]), np.float32)
        for k in range(steps):
            feed = {io_spec.HIDDEN: hidden, io_spec.ATTENTION_MASK: OrtValue.ortvalue_from_numpy(attention_mask)}
            feed.update(zip(self._past, cache, strict=True))
            hidden, *cache = self._step.run_with_ort_values([io_spec.NEXT_HIDDEN, *self._present], feed)
            states[:, k] = hidden.numpy()
            attention_mask = np.pad(attention_mask, ((0, 0), (0, 1)), constant_values=1)
        pooled = states if self._pooling is Pooling.LAST else prefix_means(states)
        return StepOutputs(prompt, l2_normalize(pooled))


def open_session(bundle: Bundle, precision: str, *, threads: int | None) -> Session:
    """Load the graphs of one precision on the CPU.

    Args:
        bundle: an opened bundle.
        precision: name of one of its variants.
        threads: threads of one run; None lets ONNX Runtime take the physical cores.

    Raises:
        ProviderError: onnxruntime is not installed.
        BundleError: a graph does not load, or belongs to another bundle.
    """
    facts = bundle.manifest.graph
    graphs = bundle.manifest.variants[precision].graphs
    sessions = {role: load_graph(bundle.file(graph.path), threads=threads) for role, graph in graphs.items()}
    for role, session in sessions.items():
        found = session.get_modelmeta().custom_metadata_map.get(io_spec.GRAPH_IDENTITY_KEY)
        if found != facts.identity:
            raise BundleError(
                f"{bundle.file(graphs[role].path)}: a graph of {found} | the manifest describes {facts.identity} | "
                "the graph belongs to another bundle: export again"
            )
    if facts.layout is Layout.UNROLLED:
        return UnrolledSession(sessions["model"])
    return StepwiseSession(
        sessions["prefill"], sessions.get("step"), num_layers=facts.num_layers, pooling=facts.pooling
    )


def load_graph(path: Path, *, threads: int | None, content: bytes | None = None) -> Any:
    """Load one graph of a bundle as an ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        path: the graph's file, beside its weights.
        threads: threads of one run; None lets ONNX Runtime take the physical cores.
        content: an edited graph to load in place of the file's own content.

    Raises:
        ProviderError: onnxruntime is not installed.
        BundleError: the graph does not load.
    """
    ort = _onnxruntime()
    options = ort.SessionOptions()
    # The planner that reuses activation buffers is quadratic in nodes (minutes for an unrolled graph); the arena
    # recycles the buffers anyway, so without it load is linear at the same speed and the same memory.
    options.enable_mem_reuse = False
    if threads is not None:
        options.intra_op_num_threads = threads
    if content is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        return ort.InferenceSession(content or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as err:  # onnxruntime raises its own exceptions, which share only Exception
        raise BundleError(f"{path}: {_first_line(str(err))} | a graph that ONNX Runtime loads | export again") from err


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as err:
        raise ProviderError(
            "provider cpu: onnxruntime is not installed | onnxruntime 1.31 or later | pip install 'gircse-deploy[cpu]'"
        ) from err
    return onnxruntime


def _first_line(text: str) -> str:
    lines: Iterable[str] = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line), "unknown error")
