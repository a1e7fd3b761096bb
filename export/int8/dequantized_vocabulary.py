"""The vocabulary of INT8 variants for TensorRT: the integers of :class:`IntegerVocabulary`, dequantized where read.

TensorRT does not gather rows of int8 constants, and a GPU reads the vocabulary so fast that the whole sum needs no
approximation::

    E = DQ(table, scale per row),   row = Gather(E, ids),   s = softmax(logits) @ E

E is dequantized once in the graph and stays int8 in the engine. A tied lm_head reads it too; the bundle has those
integers a second time, transposed, for the kernels of CPUs alone. Where the state stays in float, no product reads E
transposed: an engine would hold it twice (demo, TensorRT-RTX 1.7: 199 MB in place of 171).
"""

from dataclasses import dataclass

import onnx_ir as ir

from gircse.export.graph.builder import GraphBuilder
from gircse.export.int8.qdq import QdqBuilder, QdqTarget
from gircse.export.int8.vocabulary import IntegerVocabulary, integer_weight
from gircse.export.int8.weights import WeightSource
from gircse.runtime import tensor_names


@dataclass(frozen=True)
class DequantizedVocabulary:
    """Reads the initializers of ``integers``."""

    integers: IntegerVocabulary

    @property
    def weight_sources(self) -> tuple[WeightSource, ...]:
        """What makes the initializers: the same as for ONNX Runtime."""
        return self.integers.weight_sources

    def embed(self, g: GraphBuilder, input_ids: ir.Value) -> ir.Value:
        """(batch, tokens) int64 -> rows of E (batch, tokens, hidden) float32."""
        return g.op("Gather", self._table(g), input_ids)

    def soft_token(self, g: GraphBuilder, prefix: str, hidden: ir.Value) -> ir.Value:
        """(rows, hidden) -> softmax(lm_head(h) / T) @ E (rows, hidden) float32; ``prefix`` names the step."""
        logits = g.temper(self._logits(g, hidden))
        logits.name = prefix + tensor_names.LOGITS
        if self.integers.limbs is None:
            return g.op("Gemm", g.op("Softmax", logits, axis=-1), self._table(g))  # (rows, vocab) @ (vocab, hidden)
        probabilities = g.op("Softmax", g.op("Transpose", logits, perm=[1, 0]), axis=0)  # (vocab, rows)
        summed = g.op("Gemm", self._table(g), probabilities, transA=1)  # (hidden, rows)
        return g.op("Transpose", summed, perm=[1, 0])

    def _logits(self, g: GraphBuilder, hidden: ir.Value) -> ir.Value:
        integers, qdq = self.integers, QdqBuilder(g, QdqTarget.TENSORRT)
        state = integers.state(qdq, hidden)
        if integers.tied and integers.limbs is None:
            column = g.op("Transpose", state.rows, perm=[1, 0])
            return g.op("Transpose", g.op("MatMul", self._table(g), column), perm=[1, 0])
        if integers.tied:
            weight = g.op("Transpose", self._table(g), perm=[1, 0])
        else:
            weight = qdq.dequantize_weight(*integer_weight(g, integers.head))
        return qdq.multiply(state, weight)

    def _table(self, g: GraphBuilder) -> ir.Value:
        """E (vocab, hidden), dequantized at its first use."""
        table, scales = integer_weight(g, self.integers.table)
        readers = table.consumers()
        return readers[0].outputs[0] if readers else QdqBuilder(g).dequantize_weight(table, scales, axis=0)
