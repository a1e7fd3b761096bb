"""ONNX Runtime sessions by themselves."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from support.int8_bundles import int8_bundle
from support.small_models import SmallModels
from support.tolerances import SMALL_MODEL_MAX_DIFFERENCE

from gircse.runtime import OptionError, ProviderError
from gircse.runtime.bundle import Bundle
from gircse.runtime.integer_products import FLOAT_PRODUCTS
from gircse.runtime.manifest import Layout
from gircse.runtime.ort_session import StepwiseSession, load_graph, open_session


def test_the_cpu_runs_without_a_binding_and_gets_the_same_bits(small_models: SmallModels) -> None:
    """A binding for each of the many cache tensors costs more; it stays the way of a GPU, and is as good here."""

    class Bound(StepwiseSession):
        _run_on_cpu = StepwiseSession._run_on_device

    bundle = Bundle.open(small_models.bundle("llama", precisions=("fp32", "fp16")))
    facts = bundle.manifest.graph
    draw = np.random.default_rng(0)
    input_ids = draw.integers(1, facts.vocab_size, (3, 12))
    mask = np.tril(np.ones((12, 12), np.int64))[[11, 4, 0], ::-1]  # left padding
    for precision in bundle.manifest.variants:
        graph = load_graph(bundle.graph(precision, Layout.STEPWISE), threads=1)
        for steps in (0, 1, facts.steps):
            ours, theirs = (kind(graph, facts).run(input_ids, mask, steps=steps) for kind in (StepwiseSession, Bound))
            np.testing.assert_array_equal(ours.prompt_embedding, theirs.prompt_embedding)
            np.testing.assert_array_equal(ours.step_embeddings, theirs.step_embeddings)


@pytest.mark.parametrize("layout", Layout)
def test_a_closed_session_says_so(small_models: SmallModels, layout: Layout) -> None:
    session = open_session(Bundle.open(small_models.bundle("qwen2")), "fp32", layout=layout, threads=1)
    ids = np.ones((1, 3), np.int64)
    assert session.run(ids, ids, steps=1).prompt_embedding.shape == (1, 48)
    session.close()
    session.close()
    with pytest.raises(OptionError, match=r"^session is closed\. Open the bundle again\.$"):
        session.run(ids, ids, steps=1)


@pytest.mark.parametrize("layout", Layout)
def test_what_fails_in_a_run_is_an_error_of_ours(small_models: SmallModels, layout: Layout) -> None:
    session = open_session(Bundle.open(small_models.bundle("qwen2")), "fp32", layout=layout, threads=1)
    ids = np.full((2, 3), 10**6)  # outside the vocabulary
    with pytest.raises(ProviderError, match=r"^ONNX Runtime failed in a batch of 2 texts of 3 tokens: .* out of data"):
        session.run(ids, np.ones_like(ids), steps=1)


def test_a_weight_of_any_size_becomes_float_at_load(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime's default, for comparison, leaves one above 1 GiB in FP32 as it is and converts it in every run."""
    shape = [1024, 270_000]
    weight = onnx.TensorProto(
        name="w", data_type=onnx.TensorProto.INT8, dims=shape, data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("location", "w.bin"), ("offset", 0), ("length", shape[0] * shape[1])):
        weight.external_data.add(key=key, value=str(value))
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(shape[0] * shape[1])  # zeros that take no room
    scale = onnx.numpy_helper.from_array(np.float32(0.5), "s")
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["w", "s"], ["float"]),
        onnx.helper.make_node("Gather", ["float", "i"], ["y"]),
    ]
    index = onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, [1])
    row = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, shape[1]])
    graph = onnx.helper.make_graph(nodes, "g", [index], [row], [weight, scale])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11),
        tmp_path / "m.onnx",
    )
    load_graph(tmp_path / "m.onnx", threads=1)
    assert capfd.readouterr().err == ""
    default = onnxruntime.SessionOptions()
    default.add_session_config_entry(*FLOAT_PRODUCTS)
    onnxruntime.InferenceSession(tmp_path / "m.onnx", default, providers=["CPUExecutionProvider"])
    assert "Skipping constant folding for DequantizeLinear" in capfd.readouterr().err


@pytest.mark.parametrize("block", [None, 16])
def test_weights_in_int8_are_multiplied_in_float(small_models: SmallModels, block: int | None) -> None:
    """By default ONNX Runtime fuses such a product into one that rounds the activations to 8 bits too.

    Bundles exported before the scales were per output channel have them per block of inputs.
    """
    bundle = Bundle.open(int8_bundle(small_models, "llama"))
    content = _with_scales_by_block(bundle.graph("int8-weights", Layout.STEPWISE), block)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    unfused = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    ids = np.arange(1, 13)[None]
    found, expected = (
        session.run(ids, np.ones_like(ids), steps=1).step_embeddings
        for session in (
            open_session(bundle, "int8-weights", threads=1, content=content),
            StepwiseSession(unfused, bundle.manifest.graph),
        )
    )
    assert np.abs(found - expected).max() < SMALL_MODEL_MAX_DIFFERENCE


def _with_scales_by_block(path: Path, block: int | None) -> bytes:
    """Return a graph with its weights, whose products have a scale for every so many inputs of an output.

    Args:
        path: of a graph of int8-weights.
        block: inputs that share a scale; None keeps one per output.
    """
    model = onnx.load(path)
    weights = {one.name: one for one in model.graph.initializer}
    draw = np.random.default_rng(0)
    changed = []
    for node in model.graph.node:
        scale = weights.get(node.input[1]) if node.op_type == "DequantizeLinear" else None
        if block is not None and scale is not None and scale.dims:
            blocks = weights[node.input[0]].dims[0] // block
            scales = onnx.numpy_helper.to_array(scale) * draw.uniform(0.5, 1.5, (blocks, 1))
            scale.CopyFrom(onnx.numpy_helper.from_array(scales.astype(np.float32), scale.name))
            node.ClearField("attribute")
            node.attribute.extend(onnx.helper.make_attribute(*one) for one in (("axis", 0), ("block_size", block)))
            changed.append(node.input[0])
    assert len(changed) == (0 if block is None else 11)  # those of two layers, and the vocabulary's
    return model.SerializeToString()
