"""The operators that turn an activation into 8 bits and multiply it, in standard ONNX: explicit Q/DQ with static scales.

TensorRT and ONNX Runtime both make one integer product of it. Activations are unsigned integers around 128, for which
x86 CPUs have instructions::

    y = DQ(Q(x, t/127)) @ DQ(W, scale per column)

Two limbs add 8 bits to the activation by a second row that the same product reads; the weights are read once::

    hi = Q(x, t/127),  lo = Q(x - DQ(hi), t/127/254),  [a; b] = DQ([hi; lo], t/127) @ DQ(W),  y = a + b / 254
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from gircse.calibration.int8.scheme import INT8_MAX, LO_LIMB

_ZERO_POINT = 128

Attribute = int | float | Sequence[int] | ir.Graph


class NodeMaker(Protocol):
    """Adds nodes and constants to a graph."""

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Attribute) -> ir.Value:
        """Add a node and return its output."""

    def op_multi(self, op_type: str, *inputs: ir.Value, outputs: int, **attributes: Attribute) -> Sequence[ir.Value]:
        """Add a node of several outputs."""

    def constant(self, name: str, value: np.ndarray) -> ir.Value:
        """Return the initializer of a name, made at its first use."""


class QdqBuilder:
    """Adds the operators of one graph."""

    def __init__(self, graph: NodeMaker) -> None:
        """Take what adds nodes and constants."""
        self.op, self.op_multi, self.constant = graph.op, graph.op_multi, graph.constant

    def products(
        self,
        x: ir.Value,
        weights: Sequence[tuple[ir.Value, ir.Value]],
        *,
        limbs: int,
        threshold: float,
    ) -> list[ir.Value]:
        """Multiply an activation with integer weights.

        Args:
            x: (..., in) float32.
            weights: (in, out) int8 initializers, each with its scales (out,) float32.
            limbs: of x, 1 or 2.
            threshold: magnitude that becomes 127; 0 for an input that is always 0.

        Returns:
            (..., out) float32 of each weight.
        """
        step = (threshold or INT8_MAX) / INT8_MAX
        integers = self._quantized(x, step)
        first = self._dequantized(integers, step)
        wide = [self.op("DequantizeLinear", weight, scale, axis=1) for weight, scale in weights]
        if limbs == 1:
            return [self.op("MatMul", first, weight) for weight in wide]
        # The remainder is read as steps of the first digit, because one product has one scale.
        remainder = self._quantized(self.op("Sub", x, first), step / LO_LIMB)
        rows = self._dequantized(self.op("Concat", integers, remainder, axis=0), step)
        return [self._added(self.op("MatMul", rows, weight)) for weight in wide]

    def _added(self, product: ir.Value) -> ir.Value:
        hi, lo = self.op_multi("Split", product, outputs=2, axis=0, num_outputs=2)
        return self.op("Add", hi, self.op("Mul", lo, self.number(1 / LO_LIMB)))

    def _quantized(self, x: ir.Value, step: float) -> ir.Value:
        return self.op("QuantizeLinear", x, self.number(step), self._zero_point())

    def _dequantized(self, integers: ir.Value, step: float) -> ir.Value:
        return self.op("DequantizeLinear", integers, self.number(step), self._zero_point())

    def _zero_point(self) -> ir.Value:
        return self.constant("uint8_128", np.array(_ZERO_POINT, np.uint8))

    def outlier_channels(self, x: ir.Value, channels: tuple[int, ...], weight: ir.Value) -> ir.Value:
        """Multiply some channels of x (..., in) with their rows (n, out) in float."""
        name = "channels_" + "_".join(map(str, channels))
        chosen = self.op("Gather", x, self.constant(name, np.array(channels, np.int64)), axis=-1)
        return self.op("MatMul", chosen, weight)

    def integer_rows(self, table: ir.Value, ids: ir.Value) -> ir.Value:
        """Look up rows of an int8 table (vocab, hidden) without their scales: ids (...) -> (..., hidden) float32."""
        return self.op("DequantizeLinear", self.op("Gather", table, ids), self.number(1.0))

    def blockwise_product(self, x: ir.Value, weight: ir.Value, scale: ir.Value, *, block: int) -> ir.Value:
        """Multiply x (..., in) float32 with an int8 weight (in, out) and its scales (in / block, out)."""
        wide = self.op("DequantizeLinear", weight, scale, axis=0, block_size=block)
        return self.op("MatMul", x, wide)

    def number(self, value: float) -> ir.Value:
        """Return a float32 constant."""
        return self.constant(f"float_{float(value)!r}", np.array(value, np.float32))
