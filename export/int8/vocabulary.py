"""The vocabulary of INT8 variants for ONNX Runtime: an int8 table that is looked up, soft tokens from the top-k tokens.

The soft token softmax(logits) @ E reads all of E for a sum in which few rows matter. Here the top-k tokens are summed
exactly, and the rest is one calibrated vector, the mean of what they leave over::

    p = softmax(logits),  top = the k largest,  left = 1 - sum_top p_i,  s = sum_top p_i E_i + left tail

Demo, k = 128, all else in FP32: rank correlation 0.9999 with the whole sum, where leaving the rest out gives 0.9991.
A text with a high-entropy softmax (``left`` above ``HIGH_ENTROPY_MASS``) gets the whole sum, in a branch that other
batches skip.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gircse.calibration.calibration_file import SoftTokenCalibration
from gircse.calibration.int8.scheme import HIGH_ENTROPY_MASS, INT8_MAX, VOCABULARY_INPUT
from gircse.checkpoint.tensor_naming import EMBEDDING_TABLE, LM_HEAD
from gircse.export.graph.builder import GraphBuilder
from gircse.export.int8.qdq import LeftOperand, QdqBuilder
from gircse.export.int8.weights import QuantizedEmbedding, QuantizedProduct, Shape, WeightSource
from gircse.runtime import tensor_names

MAX_SUM = (1 << 31) - 1
"""Largest sum of an integer product."""


@dataclass(frozen=True)
class IntegerVocabulary:
    """The vocabulary in int8.

    Attributes:
        shape: (vocab, hidden).
        tied: whether lm_head is the embedding table.
        soft_token_calibration: k and the tail; None where there are no steps.
        limbs: of the state that lm_head reads; None leaves it in float.
        threshold: its magnitude that becomes 127.
    """

    shape: Shape
    tied: bool
    soft_token_calibration: SoftTokenCalibration | None
    limbs: int | None
    threshold: float

    @property
    def weight_sources(self) -> tuple[WeightSource, ...]:
        """What makes the initializers."""
        return (self.table,) if self.soft_token_calibration is None else (self.table, self.head)

    @property
    def table(self) -> QuantizedEmbedding:
        """What makes the embedding table."""
        return QuantizedEmbedding(EMBEDDING_TABLE.removesuffix(".weight"), EMBEDDING_TABLE, self.shape)

    @property
    def head(self) -> QuantizedProduct:
        """What makes the vocabulary projection (hidden, vocab); of a tied one, the table's integers transposed."""
        return QuantizedProduct("lm_head", {EMBEDDING_TABLE if self.tied else LM_HEAD: self.shape})

    def state(self, qdq: QdqBuilder, hidden: ir.Value) -> LeftOperand:
        """Return what the projection multiplies: hidden (rows, hidden), quantized where it has limbs."""
        if self.limbs is None:
            return LeftOperand(hidden)
        return qdq.quantize(hidden, limbs=self.limbs, threshold=self.threshold, name=VOCABULARY_INPUT.name)

    def embed(self, g: GraphBuilder, input_ids: ir.Value) -> ir.Value:
        """(batch, tokens) int64 -> rows of E (batch, tokens, hidden) float32."""
        table, scales = integer_weight(g, self.table)
        row_scales = g.op("Unsqueeze", g.op("Gather", scales, input_ids), g.indices([-1]))
        return g.op("Mul", QdqBuilder(g).integer_rows(table, input_ids), row_scales)

    def soft_token(self, g: GraphBuilder, prefix: str, hidden: ir.Value) -> ir.Value:
        """(rows, hidden) -> the soft token (rows, hidden) float32; ``prefix`` names the step."""
        if self.soft_token_calibration is None:
            raise ValueError("a vocabulary without steps makes no soft tokens")
        axis = g.indices([-1])
        logits = g.temper(self._logits(g, hidden))
        logits.name = prefix + tensor_names.LOGITS
        probabilities = g.op("Softmax", logits, axis=-1)  # (rows, vocab)
        k = g.indices([self.soft_token_calibration.top_k])
        top, ids = g.op_multi("TopK", probabilities, k, outputs=2, sorted=0)  # (rows, k)
        table, scales = integer_weight(g, self.table)
        rows = QdqBuilder(g).integer_rows(table, ids)  # not scaled: the weights are smaller
        weights = g.op("Unsqueeze", g.op("Mul", top, g.op("Gather", scales, ids)), g.indices([1]))
        summed = g.op("Squeeze", g.op("MatMul", weights, rows), g.indices([1]))
        left = g.op("Sub", g.number(1.0), g.op("ReduceSum", top, axis, keepdims=1))
        tail = g.constant("mixture_tail", np.array(self.soft_token_calibration.tail, np.float32))
        near = g.op("Add", summed, g.op("Mul", left, tail))
        flat = g.op("Greater", left, g.number(HIGH_ENTROPY_MASS))
        # A sum, because the prompt pass has no rows, over which a maximum has no value.
        count = g.op("ReduceSum", g.op("Cast", flat, to=ir.DataType.FLOAT), keepdims=0)
        unchanged = g.branch("unchanged")
        return g.op(
            "If",
            g.op("Greater", count, g.number(0.0)),
            then_branch=self._whole_sum(g, probabilities, flat, near),
            else_branch=unchanged.graph_of(unchanged.op("Identity", near)),
        )

    def _whole_sum(self, g: GraphBuilder, probabilities: ir.Value, flat: ir.Value, near: ir.Value) -> ir.Graph:
        """Replace the n rows of ``near`` whose softmax is flat by the sum over all tokens, table row by table row.

        The sum is an integer product, so that the table is never wide in memory. With the table's integers e_i and
        their scales r_i it is ``sum_i w_i e_i``, where ``w_i = p_i r_i`` are not integers. Each text's w become two
        limbs::

            step = max_i w_i / 127,  hi = round(w / step),  lo = round(254 (w / step - hi)),  w ~ step (hi + lo / 254)

        With step 1, w = 99.3 gives hi = 99, lo = 76 and 99 + 76 / 254 = 99.2992. Shapes::

            w, hi, lo   (n, vocab)       [hi; lo]  (2n, vocab) int8    @ table (vocab, hidden) -> (2n, hidden) int32
            by limb     (2, n, hidden)   * [1, 1/254] (2, 1, 1), summed over axis 0 -> (n, hidden), * step (n, 1)

        Where a vocabulary is so large that an int32 sum could overflow (more than 133,000 tokens, each 127 * 127),
        ``largest`` is less than 127, and lo counts steps ``2 * largest`` times finer, so that |lo| <= largest too.
        """
        largest = min(INT8_MAX, float(MAX_SUM // (INT8_MAX * self.shape[0])))
        finer = 2 * largest
        table, scales = integer_weight(g, self.table)
        limb_axis, last = g.indices([0]), g.indices([-1])
        b = g.branch("whole_sum")
        rows = b.op("Transpose", b.op("NonZero", b.op("Squeeze", flat, last)), perm=[1, 0])  # (n, 1)
        weights = b.op("Mul", b.op("GatherND", probabilities, rows), scales)
        step = b.op("Div", b.op("ReduceMax", weights, last, keepdims=1), b.number(largest))
        scaled = b.op("Div", weights, step)
        hi = b.op("Round", scaled)
        lo = b.op("Round", b.op("Mul", b.op("Sub", scaled, hi), b.number(finer)))
        limbs = b.op("Cast", b.op("Concat", hi, lo, axis=0), to=ir.DataType.INT8)
        sums = b.op("Cast", b.op("MatMulInteger", limbs, table), to=ir.DataType.FLOAT)
        by_limb = b.op("Reshape", sums, b.constant("two_limbs", np.array([2, -1, self.shape[1]], np.int64)))
        weighted = b.op("Mul", by_limb, b.constant("limb_values", np.array([[[1]], [[1 / finer]]], np.float32)))
        summed = b.op("Mul", b.op("ReduceSum", weighted, limb_axis, keepdims=0), step)
        return b.graph_of(b.op("ScatterND", near, rows, summed))

    def _logits(self, g: GraphBuilder, hidden: ir.Value) -> ir.Value:
        qdq = QdqBuilder(g)
        return qdq.multiply(self.state(qdq, hidden), qdq.dequantize_weight(*integer_weight(g, self.head)))


def integer_weight(g: GraphBuilder, source: QuantizedEmbedding | QuantizedProduct) -> tuple[ir.Value, ir.Value]:
    """Return the initializers of a weight: its integers and their scales."""
    made = source.initializers
    weight, scales = (g.initializer(name, *made[name]) for name in (source.weight_name, source.scale_name))
    return weight, scales
