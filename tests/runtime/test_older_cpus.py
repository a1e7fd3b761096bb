"""INT8 gives the same vectors on an x86 CPU without VNNI, where 8-bit sums saturate by default."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.int8_bundles import INT8, int8_bundle
from support.older_cpus import AVX2, MAX_DIFFERENCE, SSE, TEXTS, needs_qemu, run_on
from support.small_models import SmallModels

from gircse.runtime import Embedder
from gircse.runtime.integer_products import PROBE, products_saturate

EMBED = """
import sys
import numpy as np
from gircse.runtime import Embedder
with Embedder(sys.argv[1], precision=sys.argv[2], threads=1, verify=False) as embedder:
    np.save(sys.argv[3], embedder.encode(sys.argv[4:], all_steps=True))
"""


@needs_qemu
@pytest.mark.parametrize("precision", INT8)
@pytest.mark.parametrize("cpu", [AVX2, SSE])
def test_vectors_without_vnni(small_models: SmallModels, tmp_path: Path, cpu: str, precision: str) -> None:
    bundle, output = int8_bundle(small_models, "llama"), tmp_path / "vectors.npy"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    python = os.path.realpath(sys.executable)
    run_on(cpu, python, "-c", EMBED, bundle, precision, output, *TEXTS, env=environment)
    with Embedder(bundle, precision=precision, threads=1) as embedder:
        np.testing.assert_allclose(np.load(output), embedder.encode(TEXTS, all_steps=True), atol=MAX_DIFFERENCE[cpu])


def test_the_probe_is_a_product_of_the_largest_integers() -> None:
    shape, largest = [4, 4], np.full((4, 4), 127, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["c"])],
        "p",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("c", TensorProto.INT32, shape)],
        [numpy_helper.from_array(largest, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert onnx.load_from_string(PROBE) == model


@pytest.mark.parametrize(("product", "saturates"), [(129540, False), (65534, True)])
def test_a_product_that_is_not_exact_saturates(product: int, saturates: bool) -> None:
    session = SimpleNamespace(run=lambda *_: [np.full((4, 4), product, np.int32)])
    stub = SimpleNamespace(SessionOptions=onnxruntime.SessionOptions, InferenceSession=lambda *_, **__: session)
    found = products_saturate.__wrapped__(stub)
    assert found is saturates
