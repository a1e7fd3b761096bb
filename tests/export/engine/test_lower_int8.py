"""The form of INT8 graphs that TensorRT takes: the same vectors as the bundle's own graph, and engines of it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support.int8_bundles import MODELS, export, int8_bundle, run, states, written
from support.small_models import SmallModels
from support.tolerances import (
    ENGINE_FORM_MAX_DIFFERENCE,
    ENGINE_FORM_MIN_COSINE,
    ENGINE_FORM_PROMPT_MIN_COSINE,
    ENGINE_FORM_STEPS_MAX_DIFFERENCE,
)
from support.vectors import PROMPTS, STEPS, padded

from gircse.calibration.int8.scheme import decoder_inputs
from gircse.evaluation.parity.emulation import emulated_graph
from gircse.export.build_command import main
from gircse.export.engine import builder, lower_int8
from gircse.export.engine.lower_int8 import to_engine_form
from gircse.export.int8 import vocabulary
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import ExportError
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import row_cosine
from gircse.runtime.ort_session import StepwiseSession
from gircse.runtime.trt.engine_manifest import read_engines

RTX = ("--provider", "tensorrt-rtx", "--sm", "8.9")


@pytest.fixture
def whole_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported graphs mix every soft token from all rows, as engines do."""
    monkeypatch.setattr(vocabulary, "HIGH_ENTROPY_MASS", 0.0)


def original(bundle: Path) -> ir.Model:
    return ir.load(Bundle.open(bundle).graph("int8", Layout.STEPWISE))


def rewritten(bundle: Path) -> ir.Model:
    model = original(bundle)
    to_engine_form(model)
    return model


def run_node_by_node(model: ir.Model, bundle: Path, folder: Path) -> np.ndarray:
    """Run a graph as a GPU would, every FP16 value rounded.

    Nothing is fused: ONNX Runtime makes integer products of what has unsigned activations and float ones, whose sums
    differ in the last bit, of what has signed ones.
    """
    ort = pytest.importorskip("onnxruntime")
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    ir.save(model, folder / "graph.onnx")
    content = emulated_graph(folder / "graph.onnx").SerializeToString()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = StepwiseSession(ort.InferenceSession(content, options), Bundle.open(bundle).manifest.graph)
    outputs = session.run(*padded(PROMPTS, left=True), steps=STEPS)
    return states((outputs.prompt_embedding, outputs.step_embeddings))


@pytest.mark.parametrize("name", MODELS)
def test_rewrites_change_no_number(
    small_models: SmallModels, tmp_path: Path, whole_sums: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """All of them but the one to FP16, whose roundings these models amplify; h_0, and the steps with a decoder in float.

    The bundle's soft token has 16 bits here, which a decoder in INT8 would amplify too.
    """
    monkeypatch.setattr(lower_int8, "set_precision", lambda *_: {})
    monkeypatch.setattr(lower_int8, "_rounded", lambda scale: scale.const_value.numpy())
    calibration = small_models.calibration(name, steps=STEPS)
    content = json.loads(calibration.read_text())
    content["sensitivity"]["excluded"] = [site.name for site in decoder_inputs(2)[:-1]]
    vocabulary = written(content, calibration, tmp_path)

    def difference(path: Path) -> np.ndarray:
        bundle = export(small_models, tmp_path / path.stem, path, model=name)
        made, expected = (run_node_by_node(form(bundle), bundle, tmp_path) for form in (rewritten, original))
        return np.abs(made - expected).max(axis=(0, 2))

    assert difference(calibration)[0] < ENGINE_FORM_MAX_DIFFERENCE
    assert difference(vocabulary).max() < ENGINE_FORM_STEPS_MAX_DIFFERENCE


@pytest.mark.parametrize("name", MODELS)
def test_vectors_in_fp16(small_models: SmallModels, tmp_path: Path, whole_sums: None, name: str) -> None:
    bundle = export(small_models, tmp_path / "bundle", small_models.calibration(name, steps=STEPS), model=name)
    cosines = row_cosine(run_node_by_node(rewritten(bundle), bundle, tmp_path), run(bundle, "int8"))
    assert cosines[:, 0].min() > ENGINE_FORM_PROMPT_MIN_COSINE
    assert cosines.min() > ENGINE_FORM_MIN_COSINE


@pytest.mark.parametrize(("name", "expected"), [("llama", 1), ("mistral-linear", 2)])
def test_a_tied_vocabulary_is_stored_once(small_models: SmallModels, name: str, expected: int) -> None:
    model = rewritten(int8_bundle(small_models, name))
    vocabulary = small_models.load(name).config.vocab_size
    tables = [value for value in model.graph.initializers.values() if vocabulary in value.shape.numpy()[:2]]
    assert sum(len(value.shape) == 2 for value in tables) == expected
    assert not {"If", "TopK"} & {node.op_type for node in model.graph}


def test_types(small_models: SmallModels) -> None:
    """Integers go into every product as Q/DQ with a scale in FP16; what QuantizeLinear reads and its scale are FP32."""
    graph = rewritten(int8_bundle(small_models, "llama")).graph
    for node in graph:
        if node.op_type == "QuantizeLinear":
            assert [value.dtype for value in node.inputs] == [ir.DataType.FLOAT, ir.DataType.FLOAT, ir.DataType.INT8]
        if node.op_type in {"MatMul", "Attention", "RotaryEmbedding", "Gemm"}:
            assert {value.dtype for value in node.inputs if value is not None and value.dtype} <= {
                ir.DataType.FLOAT16,
                ir.DataType.INT64,
            }
        if node.op_type == "DequantizeLinear":
            assert node.outputs[0].dtype == node.inputs[1].dtype
    products = [node for node in graph if node.op_type == "MatMul" and node.inputs[1].producer() is not None]
    assert len(products) == 2 * 5 + 1


def test_vocabulary_that_the_calibration_keeps(small_models: SmallModels, tmp_path: Path) -> None:
    calibration = small_models.calibration("llama", steps=STEPS)
    bundle = export(small_models, tmp_path / "bundle", calibration, keep_float32=("lm_head",))
    operators = Counter(node.op_type for node in rewritten(bundle).graph)
    assert operators["Gemm"] == 1
    cosines = row_cosine(run_node_by_node(rewritten(bundle), bundle, tmp_path), run(bundle, "int8"))
    assert cosines.shape == (len(PROMPTS), STEPS + 1)
    assert cosines[:, 0].min() > ENGINE_FORM_PROMPT_MIN_COSINE
    assert cosines.min() > ENGINE_FORM_MIN_COSINE


@pytest.mark.parametrize("value", [1e-9, 1e6])
def test_scale_that_fp16_cannot_hold(small_models: SmallModels, value: float) -> None:
    model = ir.load(Bundle.open(int8_bundle(small_models, "llama")).graph("int8", Layout.STEPWISE))
    scale = model.graph.initializers["model.layers.0.mlp_output.scale"]
    values = scale.const_value.numpy().copy()
    values[3] = value
    scale.const_value = ir.tensor(values, name=scale.name)
    with pytest.raises(ExportError, match=r"mlp_output\.scale: FP16 changes a scale"):
        to_engine_form(model)


# gircse-build


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip(
        "tensorrt_rtx", reason="builds with TensorRT for RTX: pip install 'gircse-deploy[tensorrt-rtx]'"
    )


@pytest.mark.parametrize("name", MODELS)
def test_engines(rtx: Any, small_models: SmallModels, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = int8_bundle(small_models, name)
    assert main([str(bundle), "--precision", "int8", *RTX]) == 0
    path = Path(capsys.readouterr().out.strip())
    (plan,) = [plan for plan, place in read_engines(Bundle.open(bundle)) if place == path]
    assert (plan.precision, plan.layout, plan.plan_bytes) == ("int8", Layout.STEPWISE, path.stat().st_size)


def test_engine_without_steps(rtx: Any, small_models: SmallModels, tmp_path: Path) -> None:
    calibration = small_models.calibration("llama", steps=0)
    bundle = export(small_models, tmp_path / "bundle", calibration, steps=0)
    assert main([str(bundle), "--precision", "int8", "--layout", "unrolled", *RTX]) == 0


def test_a_variant_of_onnx_runtime_alone(
    rtx: Any, small_models: SmallModels, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = int8_bundle(small_models, "llama")
    assert main([str(bundle), "--precision", "int8-weights", *RTX]) == 2
    assert "--precision int8-weights: made for ONNX Runtime" in capsys.readouterr().err


def test_more_float_weights_than_one_graph_holds(
    rtx: Any, small_models: SmallModels, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builder, "MAX_PROTO_BYTES", 1000)
    assert main([str(int8_bundle(small_models, "llama")), "--precision", "int8", *RTX]) == 2
    assert "GiB of weights that INT8 keeps in float" in capsys.readouterr().err
