"""The residual stream between the decoder layers, in the prompt and in each step, and how PyTorch's is read."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gircse.runtime.batch_planner import TokenBatch
from gircse.runtime.manifest import GraphFacts
from gircse.runtime.numerics import Float32

if TYPE_CHECKING:  # a bundle as reference needs no torch
    from gircse.checkpoint.reference import Reference


@dataclass(frozen=True)
class LayerTrace:
    """What the decoder layers of a model pass on.

    Attributes:
        streams: of the prompt and of each step, K + 1 arrays (L + 1, positions, hidden) float32: what the first layer
            reads, then what each of the L layers makes of it. The prompt has a position for each token, a step has one.
        states: (K + 1, hidden) float32, h_0..h_K: the last position after the final norm.
    """

    streams: Sequence[Float32]
    states: Float32


def trace_torch_layers(reference: "Reference", batch: TokenBatch, facts: GraphFacts) -> LayerTrace:
    """Run one text through the PyTorch model, whole or streamed.

    Args:
        reference: the model.
        batch: the text, without padding.
        facts: K and temperature.
    """
    stream: list[Float32] = []
    streams, states = [], []

    def keep(value: Any) -> None:
        stream.append(value[0].float().cpu().numpy())

    layers = reference.model.model.layers
    with ExitStack() as hooks:
        first = layers[0].register_forward_pre_hook(lambda _layer, inputs: keep(inputs[0]))
        hooks.callback(first.remove)
        for layer in layers:
            hooks.callback(layer.register_forward_hook(lambda _layer, _inputs, output: keep(output)).remove)
        for state in reference.refine([batch], steps=facts.steps, temperature=facts.temperature):
            streams.append(np.stack(stream))
            stream.clear()
            states.append(state.hidden[0].float().cpu().numpy())
    return LayerTrace(streams, np.stack(states))
