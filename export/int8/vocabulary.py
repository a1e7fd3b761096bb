"""The vocabulary of INT8 variants: an int8 table that is only looked up, and a soft token made of the likeliest tokens.

The soft token softmax(logits) @ E reads all of E for a sum in which few rows matter. Here the ``n`` likeliest tokens
are added up exactly, and the rest is one calibrated vector, the mean of what they leave over::

    p = softmax(logits),  top = the n largest,  left = 1 - sum_top p_i,  s = sum_top p_i E_i + left tail

Demo, n = 128, all else in FP32: rank correlation 0.9999 with the whole sum, where leaving the rest out gives 0.9991.
A text whose softmax is flat (``left`` above ``HIGH_ENTROPY_MASS``) gets the whole sum, in a branch that other batches skip.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gircse.calibration.calibration_file import SoftTokenCalibration
from gircse.calibration.int8.scheme import HIGH_ENTROPY_MASS, INT8_MAX
from gircse.export.graph.compose import EMBEDDING_TABLE, LM_HEAD, GraphBuilder
from gircse.export.int8.qdq import Attribute, QdqBuilder
from gircse.export.int8.weights import (
    BlockwiseProduct,
    IntegerProduct,
    QuantizedEmbedding,
    Shape,
    WeightSource,
    block_size,
)
from gircse.runtime import tensor_names

MAX_SUM = (1 << 31) - 1
"""Largest sum of an integer product."""


@dataclass(frozen=True)
class IntegerVocabulary:
    """The vocabulary in int8.

    Attributes:
        shape: (vocab, hidden).
        tied: whether lm_head is the embedding table.
        soft_token_calibration: the number of tokens and the tail; None where there are no steps.
        limbs: of the state that lm_head reads; None leaves it in float, with block-wise weights.
        threshold: its magnitude that becomes 127.
    """

    shape: Shape
    tied: bool
    soft_token_calibration: SoftTokenCalibration | None
    limbs: int | None
    threshold: float

    @property
    def recipes(self) -> tuple[WeightSource, ...]:
        """What fills the initializers."""
        return (self._table,) if self.soft_token_calibration is None else (self._table, self._head)

    @property
    def _table(self) -> QuantizedEmbedding:
        return QuantizedEmbedding(EMBEDDING_TABLE.removesuffix(".weight"), EMBEDDING_TABLE, self.shape)

    @property
    def _head(self) -> IntegerProduct | BlockwiseProduct:
        source = EMBEDDING_TABLE if self.tied else LM_HEAD
        if self.limbs is None:
            return BlockwiseProduct("lm_head", source, self.shape, block_size(self.shape[1]))
        return IntegerProduct("lm_head", {source: self.shape})

    def embed(self, g: GraphBuilder, input_ids: ir.Value) -> ir.Value:
        """(batch, tokens) int64 -> rows of E (batch, tokens, hidden) float32."""
        table, scale = self._table_values(g)
        scales = g.op("Unsqueeze", g.op("Gather", scale, input_ids), g.indices([-1]))
        return g.op("Mul", QdqBuilder(g).integer_rows(table, input_ids), scales)

    def mixture(self, g: GraphBuilder, prefix: str, hidden: ir.Value) -> ir.Value:
        """(rows, hidden) -> the soft token (rows, hidden) float32; ``prefix`` names the step."""
        if self.soft_token_calibration is None:
            raise ValueError("a vocabulary without steps makes no soft tokens")
        axis = g.indices([-1])
        logits = g.temper(self._logits(g, hidden))
        logits.name = prefix + tensor_names.LOGITS
        probabilities = g.op("Softmax", logits, axis=-1)  # (rows, vocab)
        tokens = g.indices([self.soft_token_calibration.top_k])
        likeliest, ids = g.op_multi("TopK", probabilities, tokens, outputs=2, sorted=0)  # (rows, n)
        table, scale = self._table_values(g)
        rows = QdqBuilder(g).integer_rows(table, ids)  # not scaled: the weights are smaller
        weights = g.op("Unsqueeze", g.op("Mul", likeliest, g.op("Gather", scale, ids)), g.indices([1]))
        mixed = g.op("Squeeze", g.op("MatMul", weights, rows), g.indices([1]))
        left = g.op("Sub", g.number(1.0), g.op("ReduceSum", likeliest, axis, keepdims=1))
        tail = g.constant("mixture_tail", np.array(self.soft_token_calibration.tail, np.float32))
        near = g.op("Add", mixed, g.op("Mul", left, tail))
        flat = g.op("Greater", left, g.number(HIGH_ENTROPY_MASS))
        # A sum, because the prompt pass has no rows, over which a maximum has no value.
        count = g.op("ReduceSum", g.op("Cast", flat, to=ir.DataType.FLOAT), keepdims=0)
        return g.op(
            "If",
            g.op("Greater", count, g.number(0.0)),
            then_branch=self._whole_sum(g, probabilities, flat, near),
            else_branch=_unchanged(near),
        )

    def _whole_sum(self, g: GraphBuilder, probabilities: ir.Value, flat: ir.Value, near: ir.Value) -> ir.Graph:
        """Mix all tokens in the rows that are flat, in integers, so that the table is never wide in memory.

        ``w_i = p_i scale_i``, each row's largest made 127, in two limbs as everywhere: ``hi + lo / 254``; less where
        a vocabulary is so large that the int32 sums could overflow.
        """
        largest = min(INT8_MAX, float(MAX_SUM // (INT8_MAX * self.shape[0])))
        table, scale = self._table_values(g)
        first, last = g.indices([0]), g.indices([-1])
        nodes: list[ir.Node] = []

        def op(op_type: str, *inputs: ir.Value, **attributes: Attribute) -> ir.Value:
            nodes.append(ir.node(op_type, inputs, attributes))
            return nodes[-1].outputs[0]

        rows = op("Transpose", op("NonZero", op("Squeeze", flat, last)), perm=[1, 0])  # (n, 1)
        weights = op("Mul", op("GatherND", probabilities, rows), scale)
        step = op("Div", op("ReduceMax", weights, last, keepdims=1), g.number(largest))
        scaled = op("Div", weights, step)
        high = op("Round", scaled)
        low = op("Round", op("Mul", op("Sub", scaled, high), g.number(2 * largest)))
        limbs = op("Cast", op("Concat", high, low, axis=0), to=ir.DataType.INT8)
        sums = op("Cast", op("MatMulInteger", limbs, table), to=ir.DataType.FLOAT)
        halves = op("Reshape", sums, g.constant("two_limbs", np.array([2, -1, self.shape[1]], np.int64)))
        weighted = op("Mul", halves, g.constant("limb_values", np.array([[[1]], [[0.5 / largest]]], np.float32)))
        mixed = op("Mul", op("ReduceSum", weighted, first, keepdims=0), step)
        op("ScatterND", near, rows, mixed)
        return _branch("whole_sum", *nodes)

    def _logits(self, g: GraphBuilder, hidden: ir.Value) -> ir.Value:
        head = self._head
        weight = g.initializer(head.weight_name, ir.DataType.INT8, head.shapes[head.weight_name])
        scale = g.initializer(head.scale_name, ir.DataType.FLOAT, head.shapes[head.scale_name])
        operators = QdqBuilder(g)
        if isinstance(head, BlockwiseProduct):
            return operators.blockwise_product(hidden, weight, scale, block=head.block)
        if self.limbs is None:
            raise ValueError("an integer product without limbs of its input")
        (logits,) = operators.products(hidden, [(weight, scale)], limbs=self.limbs, threshold=self.threshold)
        return logits

    def _table_values(self, g: GraphBuilder) -> tuple[ir.Value, ir.Value]:
        weight = g.initializer(self._table.weight_name, ir.DataType.INT8, self.shape)
        return weight, g.initializer(self._table.scale_name, ir.DataType.FLOAT, self.shape[:1])


def _unchanged(value: ir.Value) -> ir.Graph:
    return _branch("unchanged", ir.node("Identity", [value]))


def _branch(name: str, *nodes: ir.Node) -> ir.Graph:
    """Return a subgraph that gives the last node's output."""
    for index, node in enumerate(nodes):  # unnamed, they would get names that the graph around them has
        node.name = f"{name}/node_{index}"
        node.outputs[0].name = f"{name}/value_{index}"
    output = nodes[-1].outputs[0]
    output.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph([], [output], nodes=nodes, name=name)
