"""Emulated graphs round every low value, as a GPU does and ONNX Runtime's CPU provider does not."""

import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from support.small_models import SmallModels

from gircse.evaluation.parity.backends import BundleBackend
from gircse.evaluation.parity.emulation import emulated_graph
from gircse.evaluation.parity.options import ParityOptions
from gircse.evaluation.parity.run import measure_parity
from gircse.runtime.bundle import Bundle
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


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_without_room_for_copies_of_the_weights(
    small_models: SmallModels, monkeypatch: pytest.MonkeyPatch, layout: Layout, precision: str
) -> None:
    """Each weight is converted where it is used; the session holds none in FP32, and computes the same."""
    bundle = Bundle.open(small_models.bundle("llama", precisions=("fp32", "fp16", "bf16")))
    sessions: list[tuple[int, bool]] = []
    start = ort.InferenceSession

    def counted(content: bytes, options: ort.SessionOptions, **arguments: Any) -> ort.InferenceSession:
        with TemporaryDirectory() as folder:
            options.optimized_model_filepath = f"{folder}/graph.onnx"
            session = start(content, options, **arguments)
            optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
        wide = [tensor for tensor in optimized.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
        sessions.append((sum(math.prod(tensor.dims) for tensor in wide), options.enable_cpu_mem_arena))
        return session

    monkeypatch.setattr(ort, "InferenceSession", counted)
    backends = [BundleBackend(bundle, precision, layout=layout, threads=1) for _ in range(2)]
    (first, traced), (second, traced_too) = (
        measured_with(monkeypatch, backend, available)
        for backend, available in zip(backends, (1 << 40, 1 << 10), strict=True)
    )
    np.testing.assert_allclose(first[:, :2], second[:, :2], atol=1e-2 if precision == "bf16" else 1e-3)
    np.testing.assert_allclose(traced[:, 0], traced_too[:, 0], rtol=0.05, atol=0.05)
    assert backends[0].memory_note is None
    assert re.match(r"a session with copies of the weights needs 0\.\d+ GiB", str(backends[1].memory_note))
    copied, in_place = sessions[:2], sessions[2:]
    table = 520 * 48
    assert [arena for _, arena in (*copied, *in_place)] == [True, True, False, False]
    assert min(count for count, _ in copied) > 2 * table > table > max(count for count, _ in in_place)


def measured_with(
    monkeypatch: pytest.MonkeyPatch, backend: BundleBackend, available: int
) -> tuple[np.ndarray, np.ndarray]:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))
    vectors, trace = backend.embed_and_trace([[5, 6, 7, 8], [9]], lambda _: None)
    return vectors, trace.states
