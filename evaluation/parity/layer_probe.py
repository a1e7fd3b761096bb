"""Read the residual stream between the layers of a bundle's graph, and replace it.

With the stream of another backend fed to every layer, what a layer makes is wrong by its own error alone: that of the
layers, soft tokens and steps before it does not reach it, neither as its input nor as the keys and values of earlier
positions. It is teacher forcing, layer by layer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gircse.evaluation.parity.graph_probe import InnerNames, ProbedGraph
from gircse.evaluation.parity.layer_trace import LayerTrace
from gircse.runtime import tensor_names
from gircse.runtime.batch_planner import TokenBatch
from gircse.runtime.numerics import Float32
from gircse.runtime.ort_session import StepwiseSession, ort_device, run_errors
from gircse.runtime.tensor_names import FORCE, FORCED

_NOTHING = np.zeros((1, 1, 1), np.float32)
"""Stands for a value that is not replaced; it fits every shape, the empty one of what a pass does not have included."""


class LayerProbe:
    """The graph of one precision, opened between its layers."""

    def __init__(self, graph: ProbedGraph) -> None:
        """Load the edited graph.

        Raises:
            BundleError: the graph lacks the names of the inner values, or does not load.
            ProviderError: the provider is not there, or does not run the precision.
        """
        self._facts, self._unrolled = graph.facts, graph.unrolled
        self._passes = [self._names_of_pass(step) for step in range(self._facts.steps + 1)]
        self._switched = {name for names in self._passes for name in names}
        self._states = [
            (tensor_names.step_prefix(step) if step else tensor_names.PROMPT_PREFIX) + tensor_names.STATE
            for step in range(self._facts.steps + 1)
        ]
        self._graph = graph.open(
            InnerNames(switched=self._switched, read=set(self._states) if self._unrolled else set())
        )
        if not self._unrolled:
            self._session = StepwiseSession(self._graph, self._facts, device=ort_device(graph.provider))

    def trace(self, batch: TokenBatch, *, forced: LayerTrace | None = None) -> LayerTrace:
        """Run one text.

        Args:
            batch: the text, without padding.
            forced: what every layer reads in place of what the one before it makes; None lets the graph run freely.

        Returns:
            What the layers make, whatever is made of it then.
        """
        return (self._trace_unrolled if self._unrolled else self._trace_stepwise)(batch, forced)

    def _trace_unrolled(self, batch: TokenBatch, forced: LayerTrace | None) -> LayerTrace:
        feed = {tensor_names.INPUT_IDS: batch.input_ids, tensor_names.ATTENTION_MASK: batch.attention_mask}
        for step in range(len(self._passes)):
            feed |= self._replacements(step, forced)
        with run_errors(batch.input_ids):
            values = iter(self._graph.run([*self._states, *(name for names in self._passes for name in names)], feed))
        states = np.concatenate([next(values).reshape(1, -1) for _ in self._states])
        return LayerTrace([np.concatenate([next(values) for _ in names]) for names in self._passes], states)

    def _trace_stepwise(self, batch: TokenBatch, forced: LayerTrace | None) -> LayerTrace:
        passes = self._session.passes(
            batch.input_ids,
            batch.attention_mask,
            steps=self._facts.steps,
            inputs_of=lambda step: (
                dict.fromkeys((f"{name}{FORCED}" for name in self._switched), _NOTHING)
                | self._replacements(step, forced)
            ),
            outputs_of=lambda step: self._passes[step],
        )
        states, streams = [], []
        for state, *values in passes:
            states.append(state[0])
            streams.append(np.concatenate(values))
        return LayerTrace(streams, np.concatenate(states))

    def _replacements(self, step: int, forced: LayerTrace | None) -> dict[str, Any]:
        """Return the further inputs of the graph for one pass."""
        values: Sequence[Float32] = [_NOTHING] * len(self._passes[step])
        if forced is not None:
            values = [value[None] for value in forced.streams[step]]
        names = [f"{name}{FORCED}" for name in self._passes[step]]
        return {FORCE: np.full((1, 1, 1), forced is not None), **dict(zip(names, values, strict=True))}

    def _names_of_pass(self, step: int) -> list[str]:
        """Return the names of what the first layer reads and of what each layer makes; step 0 is the prompt."""
        prompt, layers = step == 0, self._facts.num_layers
        if not self._unrolled:
            return tensor_names.layer_inputs(layers, prompt=prompt, step=not prompt)
        prefix = tensor_names.PROMPT_PREFIX if prompt else tensor_names.step_prefix(step)
        first = tensor_names.EMBEDDINGS if prompt else tensor_names.SOFT_TOKEN
        return [prefix + name for name in (first, *tensor_names.layer_names(layers))]
