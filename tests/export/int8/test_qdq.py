"""Q/DQ with one limb and with two, run by ONNX Runtime, and scales in FP16."""

import numpy as np
import onnx_ir as ir
import pytest

from gircse.export.graph.builder import IR_VERSION, NodeBuilder
from gircse.export.graph.trace import OPSET
from gircse.export.int8.qdq import MAX_SCALE_ERROR, QdqBuilder, QdqTarget, fp16_scales
from gircse.runtime.errors import ExportError

INT8 = (QdqTarget.ONNX_RUNTIME, QdqTarget.TENSORRT)


def product(x: np.ndarray, *, limbs: int, target: QdqTarget, threshold: float = 127.0) -> np.ndarray:
    """Return x @ I in 8 or 16 bits."""
    ort = pytest.importorskip("onnxruntime")
    graph_input = ir.val("x", ir.DataType.FLOAT, list(x.shape))
    nodes: list[ir.Node] = []
    builder = NodeBuilder({}, nodes.append)
    qdq = QdqBuilder(builder, target)
    activation = qdq.quantize(graph_input, limbs=limbs, threshold=threshold, name="x")
    weight = builder.constant("weight", np.eye(x.shape[-1], dtype=np.int8))
    scales = builder.constant("scales", np.ones(x.shape[-1], np.float32))
    output = qdq.multiply(activation, qdq.dequantize_weight(weight, scales))
    output.name, output.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [graph_input],
        [output],
        nodes=nodes,
        initializers=list(builder.initializers.values()),
        opset_imports={"": OPSET},
        name="product",
    )
    content = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(content, options).run(None, {"x": x})[0]


@pytest.mark.parametrize("target", INT8)
def test_the_worked_number_of_the_module(target: QdqTarget) -> None:
    x = np.array([[3.7]], np.float32)
    assert product(x, limbs=1, target=target)[0, 0] == 4.0
    assert product(x, limbs=2, target=target)[0, 0] == pytest.approx(4 - 76 / 254, rel=1e-6)


@pytest.mark.parametrize("target", INT8)
@pytest.mark.parametrize(("limbs", "steps"), [(1, 0.5), (2, 0.5 / 254)])
def test_error_is_at_most_half_a_step_of_the_last_limb(target: QdqTarget, limbs: int, steps: float) -> None:
    x = np.random.default_rng(0).uniform(-2, 2, (64, 8)).astype(np.float32)
    step = 2 / 127
    assert np.abs(product(x, limbs=limbs, target=target, threshold=2.0) - x).max() < steps * step * 1.15 + 1e-6


@pytest.mark.parametrize("target", list(QdqTarget))
def test_an_input_of_zeros(target: QdqTarget) -> None:
    x = np.zeros((2, 4), np.float32)
    np.testing.assert_array_equal(product(x, limbs=2, target=target, threshold=0.0), x)


@pytest.mark.parametrize(("limbs", "error"), [(1, 2**-4), (2, 2**-8)])
def test_the_error_of_e4m3_is_relative(limbs: int, error: float) -> None:
    """Over three orders of magnitude, where integers have the same error everywhere."""
    x = np.geomspace(1e-2, 100, 4000, dtype=np.float32).reshape(-1, 8)
    x[::2] *= -1
    ours = product(x, limbs=limbs, target=QdqTarget.FP8, threshold=100.0)
    assert error / 4 < np.abs(ours / x - 1).max() <= error


@pytest.mark.parametrize(("limbs", "largest"), [(1, 100.0), (2, 100 * (1 + 1 / 16))])
def test_what_is_too_large_for_e4m3_becomes_the_largest(limbs: int, largest: float) -> None:
    """And never NaN, which E4M3 has in place of infinity."""
    x = np.array([[101, 107, 1e3, 1e30, np.inf]], np.float32)
    ours = product(np.concatenate([x, -x]), limbs=limbs, target=QdqTarget.FP8, threshold=100.0)
    np.testing.assert_array_less(np.abs(ours), largest * 1.001)  # the step is rounded up to FP16
    np.testing.assert_array_less(99.9, ours[0])
    np.testing.assert_array_equal(ours[1], -ours[0])


@pytest.mark.parametrize("threshold", [0.0, 1e-9])
def test_activations_near_zero_in_e4m3(threshold: float) -> None:
    x = np.full((2, 4), threshold, np.float32)
    assert np.abs(product(x, limbs=2, target=QdqTarget.FP8, threshold=threshold) - x).max() <= threshold


def test_scales_that_fp16_holds() -> None:
    scales = np.array([1e-4, 0.3, 7.0], np.float32)
    rounded = fp16_scales(scales, "some.scale")
    assert rounded.dtype == np.float16
    np.testing.assert_allclose(rounded, scales, rtol=MAX_SCALE_ERROR)


@pytest.mark.parametrize("value", [1e-9, 1e6])
def test_a_scale_that_fp16_cannot_hold(value: float) -> None:
    with pytest.raises(ExportError, match=r"some\.scale has a scale that FP16 changes by .*--keep-float32"):
        fp16_scales(np.array([0.1, value], np.float32), "some.scale")
