"""The graph that TensorRT engines of quantized variants are built from: vectors, types and weights."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.int8_bundles import INT8, MODELS, export, int8_bundle, run, states, written
from support.small_models import SmallModels
from support.tolerances import (
    ENGINE_GRAPH_MAX_DIFFERENCE,
    ENGINE_GRAPH_MIN_COSINE,
    ENGINE_GRAPH_PROMPT_MIN_COSINE,
    ENGINE_GRAPH_STEPS_MAX_DIFFERENCE,
)
from support.vectors import PROMPTS, STEPS, padded

from gircse.calibration.calibration_file import Calibration
from gircse.calibration.int8.scheme import decoder_inputs
from gircse.evaluation.parity.emulation import emulated_graph
from gircse.export import variants
from gircse.export.int8 import qdq, vocabulary
from gircse.export.weights import external_data
from gircse.runtime import Embedder, tensor_names
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import BundleError
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import row_cosine
from gircse.runtime.ort_session import StepwiseSession


@pytest.fixture
def whole_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs for ONNX Runtime sum every soft token over all rows, as those for TensorRT do."""
    monkeypatch.setattr(vocabulary, "HIGH_ENTROPY_MASS", 0.0)


def engine_graph(bundle: Path, precision: str = "int8") -> Path:
    opened = Bundle.open(bundle)
    return opened.engine_graph(precision, Layout.STEPWISE)


def run_node_by_node(graph: Path, bundle: Path, folder: Path) -> np.ndarray:
    """Run a graph as a GPU would, every FP16 value rounded.

    Nothing is fused: ONNX Runtime makes integer products of what has unsigned activations and float ones, whose sums
    differ in the last bit, of what has signed ones.
    """
    ort = pytest.importorskip("onnxruntime")
    model = ir.load(graph)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    ir.save(model, folder / "graph.onnx")
    content = ir.to_proto(emulated_graph(folder / "graph.onnx")).SerializeToString()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = StepwiseSession(ort.InferenceSession(content, options), Bundle.open(bundle).manifest.graph)
    outputs = session.run(*padded(PROMPTS, left=True), steps=STEPS)
    return states((outputs.prompt_embedding, outputs.step_embeddings))


@pytest.mark.parametrize("name", MODELS)
def test_but_for_fp16_both_graphs_compute_the_same(
    small_models: SmallModels, tmp_path: Path, whole_sums: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Without the rounding to FP16, which these models amplify; h_0, and the steps with a decoder in float.

    The soft token of the graph for ONNX Runtime has 16 bits here, which a decoder in INT8 would amplify too.
    """
    monkeypatch.setattr(variants, "set_precision", lambda *_: {})
    monkeypatch.setattr(qdq, "fp16_scales", lambda scales, _: scales)
    calibration = small_models.calibration(name, steps=STEPS)
    content = json.loads(calibration.read_text())
    content["sensitivity"]["excluded"] = [entry.name for entry in decoder_inputs(2)[:-1]]
    vocabulary_alone = written(content, calibration, tmp_path)

    def difference(path: Path) -> np.ndarray:
        bundle = export(small_models, tmp_path / path.stem, path, model=name)
        graphs = (engine_graph(bundle), Bundle.open(bundle).graph("int8", Layout.STEPWISE))
        made, expected = (run_node_by_node(graph, bundle, tmp_path) for graph in graphs)
        return np.abs(made - expected).max(axis=(0, 2))

    assert difference(calibration)[0] < ENGINE_GRAPH_MAX_DIFFERENCE
    assert difference(vocabulary_alone).max() < ENGINE_GRAPH_STEPS_MAX_DIFFERENCE


@pytest.mark.parametrize("precision", INT8)
@pytest.mark.parametrize("name", MODELS)
def test_vectors_in_fp16(
    small_models: SmallModels, tmp_path: Path, whole_sums: None, name: str, precision: str
) -> None:
    calibration = small_models.calibration(name, steps=STEPS)
    bundle = export(small_models, tmp_path / "bundle", calibration, model=name, precisions=(precision,))
    cosines = row_cosine(run_node_by_node(engine_graph(bundle, precision), bundle, tmp_path), run(bundle, precision))
    assert cosines[:, 0].min() > ENGINE_GRAPH_PROMPT_MIN_COSINE
    assert cosines.min() > ENGINE_GRAPH_MIN_COSINE


@pytest.mark.parametrize("precision", INT8)
@pytest.mark.parametrize(("name", "expected"), [("llama", 1), ("mistral-linear", 2)])
def test_a_tied_vocabulary_is_read_once(small_models: SmallModels, name: str, precision: str, expected: int) -> None:
    graph = ir.load(engine_graph(int8_bundle(small_models, name), precision)).graph
    vocabulary_size = small_models.load(name).config.vocab_size
    tables = [value for value in graph.initializers.values() if vocabulary_size in value.shape.numpy()[:2]]
    assert sum(len(value.shape) == 2 for value in tables) == expected
    assert not {"If", "TopK"} & {node.op_type for node in graph}


def test_a_tied_projection_is_the_table_transposed(small_models: SmallModels) -> None:
    """So a graph that reads the table for both computes the same."""
    graph = ir.load(Bundle.open(int8_bundle(small_models, "llama")).graph("int8", Layout.STEPWISE)).graph
    values = {name: value.const_value.numpy() for name, value in graph.initializers.items()}
    np.testing.assert_array_equal(values["lm_head.int8"].T, values["model.embed_tokens.int8"])
    np.testing.assert_array_equal(values["lm_head.scale"], values["model.embed_tokens.scale"])


def test_types(small_models: SmallModels) -> None:
    """Integers go into every product as Q/DQ with a scale in FP16; what QuantizeLinear reads and its scale are FP32."""
    graph = ir.load(engine_graph(int8_bundle(small_models, "llama"))).graph
    for node in graph:
        if node.op_type == "QuantizeLinear":
            scale, zero = node.inputs[1].const_value.numpy(), node.inputs[2].const_value.numpy()
            assert (scale.dtype, zero.dtype, zero) == (np.float32, np.int8, 0)
        if node.op_type == "DequantizeLinear" and node.outputs[0].consumers()[0].op_type != "Sub":
            assert node.inputs[1].dtype is ir.DataType.FLOAT16
    floats = [value for value in graph.initializers.values() if len(value.shape) == 2]
    assert {value.dtype for value in floats} == {ir.DataType.INT8, ir.DataType.FLOAT16}
    products = [node for node in graph if node.op_type == "MatMul" and node.inputs[1].producer() is not None]
    assert len(products) == 2 * 5 + 1


@pytest.mark.parametrize(("precision", "four_bits"), [("int8-weights", 0), ("int4-weights", 2 * 3)])
def test_only_weights_are_integers(small_models: SmallModels, precision: str, four_bits: int) -> None:
    """Each product reads a weight that is dequantized right before it, and FP16 rows of its outlier channels."""
    graph = ir.load(engine_graph(int8_bundle(small_models, "llama"), precision)).graph
    operators = Counter(node.op_type for node in graph)
    assert not operators["QuantizeLinear"]
    weights = [node.inputs[0] for node in graph if node.op_type == "DequantizeLinear"]
    assert all(value.is_initializer() for value in weights)
    assert Counter(value.dtype for value in weights)[ir.DataType.INT4] == four_bits
    assert all(node.inputs[1].dtype is ir.DataType.FLOAT16 for node in graph if node.op_type == "DequantizeLinear")
    products = [node for node in graph if node.op_type == "MatMul"]
    outliers = [node for node in products if node.inputs[1].is_initializer()]
    assert (len(products) - len(outliers), len(outliers)) == (2 * 5 + 1, 2 * 4)
    assert {node.inputs[1].dtype for node in outliers} == {ir.DataType.FLOAT16}


@pytest.mark.parametrize("precision", INT8)
@pytest.mark.parametrize("name", MODELS)
def test_what_a_step_writes_into_the_cache_is_what_the_next_one_reads(
    small_models: SmallModels, name: str, precision: str
) -> None:
    """Also where values are the sum of a quantized product and outlier channels."""
    graph = ir.load(engine_graph(int8_bundle(small_models, name), precision)).graph
    caches = [value for value in (*graph.inputs, *graph.outputs) if tensor_names.is_cache(str(value.name))]
    assert len(caches) == 2 * 2 * 2
    assert {value.dtype for value in caches} == {ir.DataType.FLOAT16}


def test_what_is_quantized_is_read_back_with_the_same_step(small_models: SmallModels) -> None:
    """One rounded to FP16 and one not would stretch every activation."""
    graph = ir.load(engine_graph(int8_bundle(small_models, "llama"))).graph
    checked = 0
    for node in graph:
        if node.op_type == "QuantizeLinear":
            for reader in node.outputs[0].consumers():
                if reader.op_type == "DequantizeLinear":
                    scales = [float(end.inputs[1].const_value.numpy()) for end in (node, reader)]
                    assert scales[0] == scales[1]
                    checked += 1
    assert checked == 2 * 4 + 1


@pytest.mark.parametrize("precision", INT8)
def test_both_graphs_read_the_same_integers(small_models: SmallModels, precision: str) -> None:
    bundle = Bundle.open(int8_bundle(small_models, "mistral-linear"))
    ours, other = (
        ir.load(path).graph.initializers
        for path in (bundle.engine_graph(precision, Layout.STEPWISE), bundle.graph(precision, Layout.STEPWISE))
    )
    external = {name: value for name, value in ours.items() if isinstance(value.const_value, ir.ExternalTensor)}
    integers = {name for name, value in external.items() if value.dtype in (ir.DataType.INT8, ir.DataType.INT4)}
    places = [{name: values[name].const_value.offset for name in integers} for values in (ours, other)]
    assert places[0] == places[1]
    assert len(integers) == 2 * 5 + 2
    for name, value in external.items():
        exact = other[name].const_value.numpy()
        np.testing.assert_array_equal(value.const_value.numpy(), exact.astype(value.dtype.numpy()))


def test_the_manifest_lists_the_graph(small_models: SmallModels) -> None:
    manifest = Bundle.open(int8_bundle(small_models, "llama")).manifest
    for precision in INT8:
        variant = manifest.variants[precision]
        assert variant.tensorrt is not None
        assert variant.tensorrt.path == f"{precision}/engine.onnx"
        files = {f"{precision}/{name}" for name in ("engine.onnx", "stepwise.onnx", "weights.bin")}
        assert files == variant.files <= set(manifest.files)
    assert manifest.variants["fp32"].tensorrt is None


@pytest.mark.parametrize("name", ["llama", "mistral-linear"])
def test_vocabulary_excluded_from_quantization(small_models: SmallModels, tmp_path: Path, name: str) -> None:
    calibration = small_models.calibration(name, steps=STEPS)
    bundle = export(small_models, tmp_path / "bundle", calibration, model=name, keep_float32=("lm_head",))
    operators = Counter(node.op_type for node in ir.load(engine_graph(bundle)).graph)
    assert operators["Gemm"] == 1
    cosines = row_cosine(run_node_by_node(engine_graph(bundle), bundle, tmp_path), run(bundle, "int8"))
    assert cosines.shape == (len(PROMPTS), STEPS + 1)
    assert cosines[:, 0].min() > ENGINE_GRAPH_PROMPT_MIN_COSINE
    assert cosines.min() > ENGINE_GRAPH_MIN_COSINE


def test_without_steps_the_table_is_only_looked_up(small_models: SmallModels) -> None:
    calibration = small_models.calibration("llama", steps=0)
    bundle = Bundle.open(small_models.bundle("llama", steps=0, precisions=("int8",), calibration=calibration))
    graph = ir.load(bundle.engine_graph("int8", Layout.UNROLLED)).graph
    table = graph.initializers["model.embed_tokens.int8"]
    (dequantize,) = table.consumers()
    assert [reader.op_type for reader in dequantize.outputs[0].consumers()] == ["Gather"]


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_step_that_fp16_cannot_hold(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float
) -> None:
    """Only TensorRT's graph is missing, and the export says why; ONNX Runtime, in FP32, does not mind."""
    path = small_models.calibration("llama", steps=STEPS)
    name = "model.layers.0.mlp_output"
    thresholds = [factor * value for value in Calibration.read(path).inputs[name].thresholds]
    content = json.loads(path.read_text())
    content["inputs"][name]["thresholds"] = thresholds
    bundle = export(small_models, tmp_path / "bundle", written(content, path, tmp_path))
    check_without_engine_graph(bundle, capsys.readouterr().err, name)


def test_weight_scale_that_fp16_cannot_hold(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as that of a row of the vocabulary that belongs to no token: found when the weights are written."""
    fits = external_data.fp16_scales

    def fp16_scales(scales: np.ndarray, name: str) -> np.ndarray:
        return fits(scales * np.float32(1e-7) if name == "model.embed_tokens.scale" else scales, name)

    monkeypatch.setattr(external_data, "fp16_scales", fp16_scales)
    whole = Bundle.open(int8_bundle(small_models, "llama"))
    bundle = export(small_models, tmp_path / "bundle", small_models.calibration("llama", steps=STEPS))
    check_without_engine_graph(bundle, capsys.readouterr().err, "model.embed_tokens.scale")
    weights = (bundle / "int8/weights.bin").read_bytes()
    assert whole.file("int8/weights.bin").read_bytes().startswith(weights)
    np.testing.assert_array_equal(run(bundle, "int8"), run(whole.directory, "int8"))


def check_without_engine_graph(bundle: Path, notes: str, name: str) -> None:
    assert f"no graph for TensorRT of int8: {name} has a scale that FP16 changes by" in notes
    opened = Bundle.open(bundle)
    opened.verify("int8")
    assert opened.manifest.variants["int8"].tensorrt is None
    assert not (bundle / "int8" / "engine.onnx").exists()
    assert Embedder(bundle, precision="int8").encode(["text"]).shape == (1, 48)
    with pytest.raises(BundleError, match=r"int8, has no graph for TensorRT\. Export the bundle again; .* says why"):
        opened.engine_graph("int8", Layout.STEPWISE)
