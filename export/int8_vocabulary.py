"""The vocabulary of INT8 variants: an int8 table that is only looked up, and a soft token made of the likeliest tokens.

The soft token softmax(logits) @ E reads all of E for a sum in which few rows matter. Here the ``n`` likeliest tokens
are added up exactly, and the rest is one calibrated vector, the mean of what they leave over::

    p = softmax(logits),  top = the n largest,  s = sum_top p_i E_i + (1 - sum_top p_i) tail

Demo, n = 128, all else in FP32: rank correlation 0.9999 with the whole sum, where leaving the rest out gives 0.9991.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gircse.calibration.sites import Quantization
from gircse.calibration.table import MixtureCalibration
from gircse.export.compose import EMBEDDING_TABLE, LM_HEAD, GraphBuilder
from gircse.export.int8_activations import IntegerOperators
from gircse.export.int8_weights import BlockwiseProduct, IntegerProduct, IntegerRows, Recipe, Shape, block_size
from gircse.runtime import io_spec


@dataclass(frozen=True)
class IntegerVocabulary:
    """The vocabulary in int8.

    Attributes:
        shape: (vocab, hidden).
        tied: whether lm_head is the embedding table.
        mixture_calibration: the number of tokens and the tail; None where there are no steps.
        quantization: of the state that lm_head reads; None leaves it in float, with block-wise weights.
        threshold: of a static scale.
    """

    shape: Shape
    tied: bool
    mixture_calibration: MixtureCalibration | None
    quantization: Quantization | None
    threshold: float

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """What fills the initializers."""
        return (self._table,) if self.mixture_calibration is None else (self._table, self._head)

    @property
    def _table(self) -> IntegerRows:
        return IntegerRows(EMBEDDING_TABLE.removesuffix(".weight"), EMBEDDING_TABLE, self.shape)

    @property
    def _head(self) -> IntegerProduct | BlockwiseProduct:
        source = EMBEDDING_TABLE if self.tied else LM_HEAD
        if self.quantization is None:
            return BlockwiseProduct("lm_head", source, self.shape, block_size(self.shape[1]))
        return IntegerProduct("lm_head", {source: self.shape})

    def embed(self, g: GraphBuilder, input_ids: ir.Value) -> ir.Value:
        """(batch, tokens) int64 -> rows of E (batch, tokens, hidden) float32."""
        return self._rows(g, input_ids)

    def mixture(self, g: GraphBuilder, prefix: str, hidden: ir.Value) -> ir.Value:
        """(rows, hidden) -> the soft token (rows, hidden) float32; ``prefix`` names the step."""
        if self.mixture_calibration is None:
            raise ValueError("a vocabulary without steps makes no soft tokens")
        axis = g.indices([-1])
        logits = g.temper(self._logits(g, hidden))
        logits.name = prefix + io_spec.LOGITS
        values, ids = g.op_multi("TopK", logits, g.indices([self.mixture_calibration.tokens]), outputs=2, sorted=0)
        total = g.op("ReduceLogSumExp", logits, axis, keepdims=1)
        likeliest = g.op("Exp", g.op("Sub", values, total))  # (rows, n), probabilities
        weights = g.op("Unsqueeze", likeliest, g.indices([1]))
        mixed = g.op("Squeeze", g.op("MatMul", weights, self._rows(g, ids)), g.indices([1]))
        left = g.op("Sub", g.number(1.0), g.op("ReduceSum", likeliest, axis, keepdims=1))
        tail = g.constant("mixture_tail", np.array(self.mixture_calibration.tail, np.float32))
        return g.op("Add", mixed, g.op("Mul", left, tail))

    def _logits(self, g: GraphBuilder, hidden: ir.Value) -> ir.Value:
        head = self._head
        weight = g.initializer(head.weight_name, ir.DataType.INT8, head.shapes[head.weight_name])
        scale = g.initializer(head.scale_name, ir.DataType.FLOAT, head.shapes[head.scale_name])
        operators = IntegerOperators(g)
        if isinstance(head, BlockwiseProduct):
            return operators.blockwise_product(hidden, weight, scale, block=head.block)
        if self.quantization is None:
            raise ValueError("an integer product without a quantisation of its input")
        return operators.product(hidden, weight, scale, quantization=self.quantization, threshold=self.threshold)

    def _rows(self, g: GraphBuilder, ids: ir.Value) -> ir.Value:
        weight = g.initializer(self._table.weight_name, ir.DataType.INT8, self.shape)
        scale = g.initializer(self._table.scale_name, ir.DataType.FLOAT, self.shape[:1])
        return IntegerOperators(g).rows(weight, scale, ids)
