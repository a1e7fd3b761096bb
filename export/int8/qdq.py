"""The operators of quantized products: explicit Q/DQ with static scales, standard ONNX.

ONNX Runtime and TensorRT both make one integer product of these. x is (..., in), W int8 is (in, out) with a scale for
every column, and t is the magnitude that becomes 127::

    step = t / 127,   y = DQ(Q(x, step)) @ DQ(W, scales)

With two limbs an activation has 16 bits, a coarse integer and one for its rounding error, which is at most half a step.
One product reads both, because lo is stacked under hi as more rows; so W is read once::

    hi = Q(x, step)                          (..., in)     x / step, rounded
    lo = Q(x - DQ(hi, step), step / 254)     (..., in)     what that lost, in steps 254 times finer: -127..127
    [a; b] = DQ([hi; lo], step) @ DQ(W)      (2 ..., out)  both read with one step, so b is 254 times too large
    y = a + b / 254                          (..., out)

With step 1, x = 3.7 gives hi = 4 and lo = round(-0.3 * 254) = -76, which is 4 - 76 / 254 = 3.7008: an error of 0.0008
where one limb has 0.3.

The two runtimes store activations differently (:class:`QdqTarget`). Weights are the same for both. E4M3 numbers have
448 in place of 127, and 16 in place of 254 (``export/fp8/e4m3.py``). Where only weights are quantized, x stays in
float::

    y = x @ DQ(W, scales)
"""

from enum import StrEnum
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from gircse.calibration.int8.scheme import INT8_MAX, LO_LIMB
from gircse.export.fp8.e4m3 import E4M3_LO_LIMB, e4m3_step
from gircse.export.graph.builder import NodeBuilder
from gircse.runtime.errors import ExportError

MAX_SCALE_ERROR = 0.01
"""Largest relative error of a scale in FP16. Only scales far below its normal numbers reach it."""


class QdqTarget(StrEnum):
    """What runs a graph, and so how it stores activations.

    ONNX Runtime: unsigned integers around 128, for which x86 CPUs have instructions, and FP32 scales. TensorRT: signed
    integers around 0, the only zero point that it knows; what it multiplies has scales in FP16, so a step is rounded to
    FP16 first and QuantizeLinear, which reads FP32, takes the same number. FP8: E4M3 numbers for both, else as for
    TensorRT, and a lo limb that is 16 times finer.
    """

    ONNX_RUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"
    FP8 = "fp8"


class LeftOperand(NamedTuple):
    """An activation as quantized products read it: (..., in), or (2 ..., in) with the lo limb below hi."""

    rows: ir.Value
    limbs: int = 1


class QdqBuilder:
    """Adds the operators of quantized products to one place of a graph."""

    def __init__(self, nodes: NodeBuilder, target: QdqTarget = QdqTarget.ONNX_RUNTIME) -> None:
        """Take what adds nodes, and what will run them."""
        self._nodes, self._target = nodes, target
        self._finer = E4M3_LO_LIMB if target is QdqTarget.FP8 else LO_LIMB

    def quantize(self, x: ir.Value, *, limbs: int, threshold: float, name: str) -> LeftOperand:
        """Quantize an activation.

        Args:
            x: (..., in) float32.
            limbs: 1 or 2.
            threshold: magnitude that becomes the largest number; 0 for an input that is always 0.
            name: of the quantized input, for errors.

        Raises:
            ExportError: TensorRT's FP16 cannot hold the step.
        """
        exact = (threshold or INT8_MAX) / INT8_MAX
        step = exact
        if self._target is QdqTarget.TENSORRT:
            step = float(fp16_scales(np.array(exact, np.float32), name))
        elif self._target is QdqTarget.FP8:
            step = exact = e4m3_step(threshold, name)
        hi = self._quantized(x, step)
        if limbs == 1:
            return LeftOperand(self._operand(hi, step), limbs)
        remainder = self._nodes.op("Sub", x, self._dequantized(hi, step))
        if self._target is QdqTarget.FP8:  # ONNX concatenates no E4M3 numbers
            finer = self._nodes.op("Mul", remainder, self._nodes.number(self._finer))
            both = self._quantized(self._nodes.op("Concat", x, finer, axis=0), step)
            return LeftOperand(self._operand(both, step), limbs)
        lo = self._quantized(remainder, exact / self._finer)
        return LeftOperand(self._operand(self._nodes.op("Concat", hi, lo, axis=0), step), limbs)

    def multiply(self, activation: LeftOperand, weight: ir.Value) -> ir.Value:
        """Multiply with a dequantized weight (in, out); returns (..., out) float32."""
        product = self._nodes.op("MatMul", activation.rows, weight)
        if activation.limbs == 1:
            return product
        hi, lo = self._nodes.op_multi("Split", product, outputs=2, axis=0, num_outputs=2)
        return self._nodes.op("Add", hi, self._nodes.op("Mul", lo, self._nodes.number(1 / self._finer)))

    def dequantize_weight(
        self, weight: ir.Value, scales: ir.Value, *, axis: int = 1, block: int | None = None
    ) -> ir.Value:
        """Return an integer weight in float; the product reads the integers.

        Args:
            weight: int8 or int4.
            scales: one for every index of an axis, or (in / block, out).
            axis: of the scales.
            block: neighboring inputs that share a scale, along axis 0.
        """
        if block is not None:
            return self._nodes.op("DequantizeLinear", weight, scales, axis=0, block_size=block)
        return self._nodes.op("DequantizeLinear", weight, scales, axis=axis)

    def outlier_channels(self, x: ir.Value, channels: tuple[int, ...], weight: ir.Value) -> ir.Value:
        """Multiply some channels of x (..., in) with their rows (n, out) in float."""
        name = "channels_" + "_".join(map(str, channels))
        chosen = self._nodes.op("Gather", x, self._nodes.constant(name, np.array(channels, np.int64)), axis=-1)
        return self._nodes.op("MatMul", chosen, weight)

    def integer_rows(self, table: ir.Value, ids: ir.Value) -> ir.Value:
        """Look up rows of an int8 table (vocab, hidden) without their scales: ids (...) -> (..., hidden) float32."""
        return self._nodes.op("DequantizeLinear", self._nodes.op("Gather", table, ids), self._nodes.number(1.0))

    def _quantized(self, x: ir.Value, step: float) -> ir.Value:
        return self._nodes.op("QuantizeLinear", x, self._nodes.number(step), self._zero_point())

    def _dequantized(self, integers: ir.Value, step: float) -> ir.Value:
        return self._nodes.op("DequantizeLinear", integers, self._nodes.number(step), self._zero_point())

    def _operand(self, integers: ir.Value, step: float) -> ir.Value:
        """Dequantize for a product. TensorRT's step is a constant of its own, which becomes FP16 with the product."""
        if self._target is QdqTarget.ONNX_RUNTIME:
            return self._dequantized(integers, step)
        scale = self._nodes.constant(f"operand_scale_{step!r}", np.array(step, np.float32))
        return self._nodes.op("DequantizeLinear", integers, scale, self._zero_point())

    def _zero_point(self) -> ir.Value:
        if self._target is QdqTarget.FP8:
            return self._nodes.constant("e4m3_zero", np.array(0, ir.DataType.FLOAT8E4M3FN.numpy()))
        if self._target is QdqTarget.TENSORRT:
            return self._nodes.constant("int8_zero", np.array(0, np.int8))
        return self._nodes.constant("uint8_128", np.array(128, np.uint8))


def fp16_scales(scales: np.ndarray, name: str) -> np.ndarray:
    """Round scales to FP16.

    Args:
        scales: float32, positive.
        name: what they belong to, for errors.

    Raises:
        ExportError: a scale changes by more than ``MAX_SCALE_ERROR`` of its value.
    """
    with np.errstate(over="ignore"):  # infinity is refused below
        rounded = scales.astype(np.float16)
    error = float(np.max(np.abs(rounded.astype(np.float32) / scales - 1)))
    if not error <= MAX_SCALE_ERROR:
        raise ExportError(
            name,
            f"has a scale that FP16 changes by {error:.2g} of its value",
            f"TensorRT's INT8 allows {MAX_SCALE_ERROR}",
            "Leave its product in float: --keep-float32 NAME, with a part of its weight's name.",
        )
    return rounded
