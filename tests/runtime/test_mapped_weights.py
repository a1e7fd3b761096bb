"""Without copies of its weights a session converts each of them for one product at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from support.small_models import SmallModels

from gircse.evaluation.parity.emulation import emulated_graph
from gircse.export.graph.separate_weights import separate_weights
from gircse.runtime import tensor_names
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.ort_session import load_graph

PROMPT = {
    tensor_names.INPUT_IDS: np.int64([[5, 6, 7, 8]]),
    tensor_names.ATTENTION_MASK: np.ones((1, 4), np.int64),
}


@pytest.fixture
def unrolled(small_models: SmallModels) -> Path:
    return Bundle.open(small_models.bundle("llama", precisions=("fp32", "fp16", "bf16"))).graph("fp16", Layout.UNROLLED)


def emulated(path: Path) -> bytes:
    content: bytes = ir.to_proto(emulated_graph(path, copy_weights=False)).SerializeToString()
    return content


@pytest.mark.parametrize("edited", [separate_weights, emulated])
def test_no_weight_is_converted_before_its_turn(
    unrolled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: Any
) -> None:
    """In the order of execution no two conversions of weights stand without a product between them, but for few."""
    start = ort.InferenceSession

    def profiled(content: bytes, options: ort.SessionOptions, **arguments: Any) -> ort.InferenceSession:
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
        return start(content, options, **arguments)

    monkeypatch.setattr(ort, "InferenceSession", profiled)
    session = load_graph(unrolled, content=edited(unrolled), copy_weights=False)
    session.run(None, PROMPT)
    events = [event for event in json.loads(Path(session.end_profiling()).read_text()) if event.get("cat") == "Node"]
    waiting, most, weights = 0, 0, 0
    for event in sorted(events, key=lambda event: event["ts"]):
        (shape,) = list(event["args"]["output_type_shape"][0].values()) if event["args"]["output_type_shape"] else [[]]
        if event["args"]["op_name"] == "Cast" and len(shape) == 2 and min(shape) >= 48:
            waiting, weights = waiting + 1, weights + 1
        elif event["args"]["op_name"] in ("MatMul", "Gemm", "FusedMatMul"):
            waiting = max(0, waiting - 1)
        most = max(most, waiting)
    assert weights > 4 * 7 * 2  # 4 passes, 2 layers
    assert most <= 2


def test_every_use_has_an_initializer_of_its_own(unrolled: Path) -> None:
    before = onnx.load(str(unrolled), load_external_data=False)
    after = onnx.load_from_string(separate_weights(unrolled))
    low = {one.name: one for one in after.graph.initializer if one.data_type == onnx.TensorProto.FLOAT16}
    uses = [name for node in after.graph.node for name in node.input if name in low]
    assert len(set(uses)) == len(uses)
    places = {one.name: list(one.external_data) for one in before.graph.initializer}
    copies = {name: one for name, one in low.items() if name not in places}
    assert copies
    for name, one in copies.items():
        assert list(one.external_data) == places[name.rpartition(".")[0]]


def test_vectors_are_the_same(unrolled: Path) -> None:
    shared = load_graph(unrolled, copy_weights=False).run(None, PROMPT)
    separate = load_graph(unrolled, content=separate_weights(unrolled), copy_weights=False).run(None, PROMPT)
    for one, other in zip(shared, separate, strict=True):
        np.testing.assert_array_equal(one, other)
