"""Emulated graphs round every low value, as a GPU does and ONNX Runtime's CPU provider does not."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.small_models import SmallModels

from gircse.evaluation.parity.emulation import emulated_graph
from gircse.evaluation.parity.run import ParityOptions, measure_parity
from gircse.runtime.manifest import Layout
from gircse.runtime.ort_session import load_graph


@pytest.fixture
def products(tmp_path: Path) -> Path:
    """A graph that computes x * w * w in FP16, its input and output in FP32."""
    weight = np.float16([3.1, 200, 0.7])
    x, y = ir.val("x", ir.DataType.FLOAT, [3]), ir.val("y", ir.DataType.FLOAT, [3])
    low, once, twice = (ir.val(name, ir.DataType.FLOAT16, [3]) for name in ("low", "once", "twice"))
    w = ir.val("w", ir.DataType.FLOAT16, [3], const_value=ir.tensor(weight, name="w"))
    nodes = [
        ir.node("Cast", [x], {"to": ir.DataType.FLOAT16}, outputs=[low]),
        ir.node("Mul", [low, w], outputs=[once]),
        ir.node("Mul", [once, w], outputs=[twice]),
        ir.node("Cast", [twice], {"to": ir.DataType.FLOAT}, outputs=[y]),
    ]
    graph = ir.Graph([x], [y], nodes=nodes, initializers=[w], opset_imports={"": 21})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "products.onnx")
    return tmp_path / "products.onnx"


def test_every_low_value_is_rounded(products: Path) -> None:
    model = emulated_graph(products)
    content = ir.to_proto(model).SerializeToString()
    x = np.float32([1 / 3, 7.77, 1234.5])
    (found,) = load_graph(products, content=content).run(["y"], {"x": x})
    with np.errstate(over="ignore"):  # 7.77 * 200 * 200 is more than FP16 holds
        weight = np.float16([3.1, 200, 0.7])
        wanted = (x.astype(np.float16) * weight * weight).astype(np.float32)
    np.testing.assert_array_equal(found, wanted)
    assert np.isinf(found[1])
    assert "once" in {value.name for node in model.graph for value in node.outputs}  # where a probe looks for it


def test_low_precisions_in_both_layouts(small_models: SmallModels, tmp_path: Path) -> None:
    """Emulated variants against FP32 of the same bundle, in the graph that is not the bundle's default too."""
    bundle = small_models.bundle("llama", precisions=("fp32", "fp16", "bf16"))
    for layout in Layout:
        result = measure_parity(ParityOptions(bundle, reference=f"{bundle}:fp32", layout=layout))
        assert [candidate.precision for candidate in result.report.candidates] == ["fp16", "bf16"]
        fp16, bf16 = (1 - candidate.steps[1].cosine_mean for candidate in result.report.candidates)
        assert 0 < fp16 < bf16 / 10  # three bits of mantissa apart
