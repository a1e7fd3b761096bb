"""Look inside a bundle's own graphs: states, probabilities, and soft tokens that can be read and replaced.

An ``onnxruntime`` session shows graph outputs only. So the graph is edited in memory, its weights staying where they
are: inner values become outputs, and behind some of them, here the soft tokens, stands a switch::

    soft_token = Where(force, forced soft token, computed soft token)

With ``force`` off the graph computes what it always does; with it on, every step is fed the reference's soft token, and
what is left of the difference is the error of that one step (teacher forcing).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from gircse.evaluation.parity.batches import side_batches
from gircse.evaluation.parity.emulation import LOW_TYPES, cast, emulated_graph
from gircse.evaluation.parity.step_trace import StepValues
from gircse.reporting.progress import Advance
from gircse.runtime import tensor_names
from gircse.runtime.batch_planner import TokenBatch
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import BundleError
from gircse.runtime.manifest import GraphFacts, Layout
from gircse.runtime.numerics import Float32
from gircse.runtime.ort_session import StepwiseSession, load_graph, ort_device, run_errors
from gircse.runtime.precision import multiplies_integers, precision_spec
from gircse.runtime.provider import Provider
from gircse.runtime.tensor_names import FORCE, FORCED

Feed = dict[str, Any]


@dataclass(frozen=True)
class InnerNames:
    """Inner values of a graph: those with a switch, which are read too, and those that are only read."""

    switched: set[str]
    read: set[str]


@dataclass(frozen=True)
class ProbedGraph:
    """Which graph of a bundle to open between its nodes, and where it runs.

    Attributes:
        bundle: an opened bundle.
        precision: name of one of its variants. On the CPU, FP16 and BF16 are emulated.
        layout: which of its graphs; None is the one that suits the provider.
        provider: one of ONNX Runtime's.
        threads: threads of one run; None lets ONNX Runtime take the physical cores.
        copy_weights: see ``load_graph``.
    """

    bundle: Bundle
    precision: str
    layout: Layout | None = None
    provider: Provider = Provider.CPU
    threads: int | None = None
    copy_weights: bool = True

    @property
    def facts(self) -> GraphFacts:
        """What it computes."""
        return self.bundle.manifest.graph

    @property
    def unrolled(self) -> bool:
        """Whether it is the one with all steps."""
        return self._layout is Layout.UNROLLED

    @property
    def _layout(self) -> Layout:
        return self.bundle.layout(self.precision, self.provider, self.layout)

    def open(self, inner: InnerNames) -> Any:
        """Load it with inner values as outputs, and the inputs that replace the switched ones.

        Returns:
            An ``onnxruntime.InferenceSession``. Of each switched value it takes a replacement, named with ``FORCED``,
            and it takes ``FORCE``, which says whether the graph goes on with the replacements. Its output is always
            what was computed.

        Raises:
            BundleError: the graph lacks a value, or does not load.
            ProviderError: the provider is not there, or does not run the precision.
        """
        path = self.bundle.graph(self.precision, self._layout)
        emulated = precision_spec(self.precision).emulated and self.provider is Provider.CPU
        model = emulated_graph(path, copy_weights=self.copy_weights) if emulated else ir.load(path)
        return load_graph(
            path,
            provider=self.provider,
            threads=self.threads,
            content=_instrumented(path, model, inner),
            copy_weights=self.copy_weights,
            integer_products=multiplies_integers(self.precision),
        )


class GraphProbe:
    """The graphs of one precision, opened for inspection."""

    def __init__(self, graph: ProbedGraph) -> None:
        """Load the edited graph.

        Raises:
            BundleError: the graph lacks the names of the inner values, or does not load.
            ProviderError: the provider is not there, or does not run the precision.
        """
        self._manifest, self._facts = graph.bundle.manifest, graph.facts
        self._unrolled = graph.unrolled
        steps = range(1, self._facts.steps + 1)
        self._prefixes = [tensor_names.step_prefix(step if self._unrolled else None) for step in steps]
        prefixes = set(self._prefixes)
        # The states of the stepwise graph are outputs already.
        states = {tensor_names.PROMPT_PREFIX, *prefixes} if self._unrolled else set()
        inner = InnerNames(
            switched={prefix + tensor_names.SOFT_TOKEN for prefix in prefixes},
            read={prefix + tensor_names.PROBABILITIES for prefix in prefixes}
            | {prefix + tensor_names.STATE for prefix in states},
        )
        self._graph = graph.open(inner)
        if not self._unrolled:
            self._session = StepwiseSession(self._graph, self._facts, device=ort_device(graph.provider))

    def refine(
        self, token_ids: Sequence[list[int]], *, advance: Advance, forced: Float32 | None = None
    ) -> Iterator[StepValues]:
        """Refine texts in batches of like length.

        Args:
            token_ids: token ids of each text.
            advance: told how many texts were just done.
            forced: (n, K, hidden) float32, soft tokens to feed in place of the computed ones; None feeds those.
        """
        run = self._run_unrolled if self._unrolled else self._run_stepwise
        for batch in side_batches(token_ids, self._manifest):
            yield from run(batch, None if forced is None else forced[list(batch.rows)])
            advance(len(batch.rows))

    def _run_unrolled(self, batch: TokenBatch, forced: Float32 | None) -> Iterator[StepValues]:
        feed: Feed = {tensor_names.INPUT_IDS: batch.input_ids, tensor_names.ATTENTION_MASK: batch.attention_mask}
        names = [tensor_names.PROMPT_PREFIX + tensor_names.STATE]
        for index, prefix in enumerate(self._prefixes):
            feed |= _force(prefix, forced, index)
            names += [prefix + tensor_names.STATE, *_soft_token_names(prefix)]
        with run_errors(batch.input_ids):
            hidden, *values = self._graph.run(names, feed)
        yield StepValues(list(batch.rows), 0, hidden)
        for step in range(1, len(self._prefixes) + 1):
            yield _step_values(batch, step, *values[3 * (step - 1) : 3 * step])

    def _run_stepwise(self, batch: TokenBatch, forced: Float32 | None) -> Iterator[StepValues]:
        prefix = tensor_names.step_prefix(None)
        passes = self._session.passes(
            batch.input_ids,
            batch.attention_mask,
            steps=len(self._prefixes),
            inputs_of=lambda step: _force(prefix, forced if step else None, step - 1) if self._prefixes else {},
            outputs_of=lambda step: _soft_token_names(prefix) if step else (),
        )
        (hidden,) = next(passes)
        yield StepValues(list(batch.rows), 0, hidden[:, 0])
        for step, values in enumerate(passes, start=1):
            yield _step_values(batch, step, *values)


def _soft_token_names(prefix: str) -> list[str]:
    return [prefix + tensor_names.SOFT_TOKEN, prefix + tensor_names.PROBABILITIES]


def _step_values(
    batch: TokenBatch, step: int, state: Float32, soft_token: Float32, probabilities: Float32
) -> StepValues:
    """Bring a step's values into one shape; states are (batch, 1, hidden), probabilities (vocab, batch)."""
    return StepValues(list(batch.rows), step, state[:, 0], soft_token[:, 0], probabilities.T)


def _force(prefix: str, forced: Float32 | None, index: int) -> Feed:
    soft_token = np.zeros((1, 1, 1), np.float32) if forced is None else forced[:, index : index + 1]
    return {FORCE: np.full((1, 1, 1), forced is not None), prefix + tensor_names.SOFT_TOKEN + FORCED: soft_token}


def _instrumented(path: Path, model: ir.Model, inner: InnerNames) -> bytes:
    """Return the graph with its switches, the inner values being outputs."""
    graph = model.graph
    values = {str(value.name): value for node in graph for value in node.outputs}
    for name in sorted(inner.read - set(values)):
        prefix = name.removesuffix(tensor_names.PROBABILITIES)
        if prefix + tensor_names.LOGITS in values:
            values[name] = _add_probabilities(graph, values[prefix + tensor_names.LOGITS], name)
    if missing := sorted((inner.switched | inner.read) - set(values)):
        raise BundleError(
            str(path),
            f"has no value {missing[0]}",
            "the probe finds inner values by their names",
            "Export the bundle again with this version.",
        )
    force = ir.val(FORCE, ir.DataType.BOOL, [1, 1, 1])
    if inner.switched:
        graph.inputs.append(force)
    for name in sorted(inner.switched):
        values[name] = _add_switch(graph, values[name], force)
    graph.outputs.extend(values[name] for name in sorted(inner.read | inner.switched))
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def _add_probabilities(graph: ir.Graph, logits: ir.Value, name: str) -> ir.Value:
    """Compute the probabilities of all tokens where a graph has the logits only, as INT8 variants do."""
    softmax = ir.node("Softmax", [logits], {"axis": -1})
    probabilities = ir.Value(name=name)
    graph.extend([softmax, ir.node("Transpose", softmax.outputs, {"perm": [1, 0]}, outputs=[probabilities])])
    return probabilities


def _add_switch(graph: ir.Graph, computed: ir.Value, force: ir.Value) -> ir.Value:
    """Let every reader of a value read the forced one instead, if so told; return the computed one in FP32."""
    name = str(computed.name)
    forced = ir.val(f"{name}{FORCED}", ir.DataType.FLOAT, [None, None, None])
    graph.inputs.append(forced)
    chosen, producer = ir.Value(), computed.producer()
    if producer is None:
        raise ValueError(f"{computed.name} is not computed")
    computed.replace_all_uses_with(chosen)
    low = computed.dtype
    if low not in LOW_TYPES:
        graph.insert_after(producer, ir.node("Where", [force, forced, computed], outputs=[chosen]))
        return computed
    # Read and fed in FP32: numpy has no BF16.
    forced_low, shown = ir.Value(), ir.val(name, ir.DataType.FLOAT)
    computed.name = f"{name}.low"
    switch = ir.node("Where", [force, forced_low, computed], outputs=[chosen])
    graph.insert_after(producer, (cast(forced, low, forced_low), switch, cast(computed, ir.DataType.FLOAT, shown)))
    return shown
