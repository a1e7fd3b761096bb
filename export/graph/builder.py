"""Add nodes and constants to ONNX graphs: the one way in which every part of the export does it.

A :class:`NodeBuilder` makes nodes at one place: before or after a node of a finished graph, at the end of a new graph
(:class:`GraphBuilder`), or in a branch of an ``If`` (:class:`Branch`). Constants go into the graph's initializers, each
name once.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import onnx_ir as ir

from gircse.export.graph import trace
from gircse.export.graph.architecture import DecoderShape
from gircse.runtime import tensor_names
from gircse.runtime.manifest import Pooling
from gircse.runtime.numerics import L2_EPSILON

IR_VERSION = 10

Attribute = int | float | Sequence[int] | ir.Graph

MASKED = -30000.0
"""Bias of a masked position: makes its attention weight exactly 0, and leaves FP16 room for the score itself."""


@dataclass(frozen=True)
class RefinementSettings:
    """What the graphs compute besides the decoder: K, pooling and the softmax temperature T."""

    steps: int
    pooling: Pooling
    temperature: float


class NodeBuilder:
    """Makes nodes at one place of a graph."""

    def __init__(self, initializers: MutableMapping[str, ir.Value], insert: Callable[[ir.Node], None]) -> None:
        """Take the graph's initializers by name, and what puts a new node in its place, after those made before it."""
        self.initializers, self._insert = initializers, insert

    @classmethod
    def before(cls, graph: ir.Graph, node: ir.Node) -> Self:
        """Return a builder whose nodes stand before a node of a finished graph."""
        return cls(graph.initializers, lambda new: graph.insert_before(node, new))

    @classmethod
    def after(cls, graph: ir.Graph, node: ir.Node) -> Self:
        """Return a builder whose nodes follow a node of a finished graph."""
        last = [node]

        def insert(new: ir.Node) -> None:
            graph.insert_after(last[-1], new)
            last.append(new)

        return cls(graph.initializers, insert)

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """Add a node and return its output."""
        return self.op_multi(op_type, *inputs, outputs=1, **attributes)[0]

    def op_multi(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, **attributes: Attribute
    ) -> Sequence[ir.Value]:
        """Add a node of several outputs and return them."""
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs)
        self._insert(node)
        return node.outputs

    def initializer(self, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """Return the initializer of a name, made without a value at its first use: the weights fill it."""
        if name not in self.initializers:
            self.initializers[name] = ir.val(name, dtype, shape)
        return self.initializers[name]

    def constant(self, name: str, value: np.ndarray) -> ir.Value:
        """Return the initializer of a name, made at its first use."""
        if name not in self.initializers:
            self.initializers[name] = ir.val(name, const_value=ir.tensor(value, name=name))
        return self.initializers[name]

    def index(self, value: int) -> ir.Value:
        """Return an int64 scalar."""
        return self.constant(f"int_{value}", np.array(value, np.int64))

    def indices(self, values: Sequence[int]) -> ir.Value:
        """Return an int64 vector."""
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def number(self, value: float) -> ir.Value:
        """Return a float32 scalar."""
        return self.constant(f"float_{float(value)!r}", np.array(value, np.float32))

    def branch(self, name: str) -> "Branch":
        """Start a branch of an ``If`` of this graph."""
        return Branch(name, self.initializers)


class Branch(NodeBuilder):
    """A subgraph under construction; its nodes may read every value of the graph around it."""

    def __init__(self, name: str, initializers: MutableMapping[str, ir.Value]) -> None:
        """Start an empty subgraph, whose constants are those of the graph around it."""
        self._name, self._nodes = name, list[ir.Node]()
        super().__init__(initializers, self._nodes.append)

    def graph_of(self, output: ir.Value) -> ir.Graph:
        """Return the subgraph with its one output, float32."""
        for index, node in enumerate(self._nodes):  # unnamed, they would get names that the graph around them has
            node.name = f"{self._name}/node_{index}"
            node.outputs[0].name = f"{self._name}/value_{index}"
        output.type = ir.TensorType(ir.DataType.FLOAT)
        return ir.Graph([], [output], nodes=self._nodes, name=self._name)


class GraphBuilder(NodeBuilder):
    """One graph under construction: its nodes, its weights by name, and the pieces that several graphs share."""

    def __init__(self, decoder: ir.Graph, shape: DecoderShape, settings: RefinementSettings) -> None:
        """Start an empty graph."""
        self._nodes = list[ir.Node]()
        super().__init__({}, self._nodes.append)
        self.decoder, self.shape, self.settings = decoder, shape, settings
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._of_weights_alone: dict[ir.Value, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Declare an input of the graph."""
        self._inputs.append(ir.val(name, dtype, shape))
        return self._inputs[-1]

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
        """Name a value and make it an output of the graph."""
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        self._outputs.append(value)

    def prompt(self, *, mask_width: str = "tokens") -> tuple[ir.Value, ir.Value]:
        """Declare ids and mask, the inputs that every graph has."""
        return (
            self.input(tensor_names.INPUT_IDS, ir.DataType.INT64, ["batch", "tokens"]),
            self.input(tensor_names.ATTENTION_MASK, ir.DataType.INT64, ["batch", mask_width]),
        )

    def weight(self, name: str) -> ir.Value:
        """Return the initializer of a (vocab, hidden) weight."""
        return self.initializer(name, ir.DataType.FLOAT, (self.shape.vocab_size, self.shape.hidden_size))

    def key_bias(self, mask: ir.Value) -> ir.Value:
        """(batch, keys) int64 -> (batch, 1, 1, keys) float32: 0 for a real token, MASKED for padding."""
        padding = self.op("Sub", self.index(1), self.op("Unsqueeze", mask, self.indices([1, 2])))
        return self.op("Mul", self.op("Cast", padding, to=ir.DataType.FLOAT), self.number(MASKED))

    def zeros_of_batch(self, tokens: ir.Value) -> ir.Value:
        """(batch, 1) -> zeros (batch, 1, 1, 1) float32, the bias of a soft token."""
        batch = self.op("Shape", tokens, start=0, end=1)
        shape = self.op("Concat", batch, self.indices([1, 1, 1]), axis=0)
        return self.op("Expand", self.number(0.0), shape)

    def softcap(self, logits: ir.Value) -> ir.Value:
        """Bound the logits smoothly, if the model does."""
        if self.shape.logit_softcap is None:
            return logits
        cap = self.number(self.shape.logit_softcap)
        return self.op("Mul", self.op("Tanh", self.op("Div", logits, cap)), cap)

    def temper(self, logits: ir.Value) -> ir.Value:
        """Divide by the temperature, unless it is 1."""
        temperature = self.settings.temperature
        return logits if temperature == 1.0 else self.op("Div", logits, self.number(temperature))

    def l2_normalize(self, vectors: ir.Value) -> ir.Value:
        """Divide vectors (..., n) by their norms."""
        norms = self.op("ReduceL2", vectors, self.indices([-1]), keepdims=1)
        return self.op("Div", vectors, self.op("Max", norms, self.number(L2_EPSILON)))

    def decode(
        self, prefix: str, embeds: ir.Value, bias: ir.Value, positions: ir.Value, past: Sequence[ir.Value] | None
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Add one copy of the decoder to the graph.

        Args:
            prefix: put before the name of every node and value of the copy.
            embeds: (batch, S, hidden).
            bias: (batch, 1, S or 1, past + S).
            positions: (batch, S) int64.
            past: the KV cache, or None for the prompt, which has none: its Concat nodes fall away.

        Returns:
            The states (batch, S, hidden) and the grown KV cache.
        """
        inputs = {value.name: value for value in self.decoder.inputs}
        values: dict[ir.Value, ir.Value] = {
            inputs[trace.INPUTS_EMBEDS]: embeds,
            inputs[trace.ATTENTION_BIAS]: bias,
            inputs[trace.POSITION_IDS]: positions,
        }
        if past is not None:
            names = tensor_names.cache_names("past", self.shape.num_layers)
            values.update(zip((inputs[name] for name in names), past, strict=True))
        for name, value in self.decoder.initializers.items():
            values[value] = self.initializers.setdefault(name, _copy_initializer(value))
        values.update(self._of_weights_alone)
        for node in self.decoder:
            self._copy(node, prefix, values)
        states, *cache = (values[output] for output in self.decoder.outputs)
        return states, cache

    def _copy(self, node: ir.Node, prefix: str, values: dict[ir.Value, ir.Value]) -> None:
        if node.outputs[0] in values:
            return
        known = [value for value in node.inputs if value is not None and value in values]
        if node.op_type == "Concat" and len(known) == 1:  # the other input is the cache that the prompt does not have
            values[node.outputs[0]] = values[known[0]]
            return
        inputs = [values[value] if value is not None else None for value in node.inputs]
        outputs = self.op_multi(node.op_type, *inputs, outputs=len(node.outputs))
        copy = self._nodes[-1]
        copy.name = f"{prefix}{node.name}"
        copy.attributes.update(node.attributes)
        for original, output in zip(node.outputs, outputs, strict=True):
            output.name = f"{prefix}{original.name}"
            output.type = original.type
            values[original] = output
            if all(value in self._of_weights_alone or value.is_initializer() for value in node.inputs if value):
                self._of_weights_alone[original] = output  # the same in every copy of the decoder

    def model(self) -> ir.Model:
        """Return what has been built."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": trace.OPSET},
            name="gircse",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="gircse-deploy")


def _copy_initializer(value: ir.Value) -> ir.Value:
    copy = ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=value.const_value)
    copy.meta.update(value.meta)
    return copy
