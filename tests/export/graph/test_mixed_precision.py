"""FP16 and BF16 variants: what is low and what stays FP32, and that the vectors survive."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto
from support.small_models import SmallModels
from support.tolerances import LOW_PRECISION_MIN_COSINE
from support.vectors import PROMPTS, expected
from transformers import AutoModelForCausalLM

from gircse.evaluation.parity.backends import BundleBackend
from gircse.export.exporter import export_bundle
from gircse.export.graph.mixed_precision import MIXTURE_SCALE, set_precision
from gircse.export.options import ExportOptions
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import ExportError, OptionError
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import Float32, row_cosine
from gircse.runtime.precision import Precision

ALL = ("fp32", "fp16", "bf16")
LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
STEPS = 5


def embed(bundle: Path, precision: str, layout: Layout) -> Float32:
    """Return z_0..z_K of the prompts; FP16 and BF16 are emulated."""
    side = BundleBackend(Bundle.open(bundle), precision, layout=layout, threads=1)
    return side.embed(PROMPTS, lambda _: None)


def reference(small_models: SmallModels, name: str) -> Float32:
    prompt, steps = expected(small_models.load(name))
    return np.concatenate([prompt[:, None], steps], axis=1)


def load_graph(bundle: Path, precision: str, layout: Layout) -> onnx.GraphProto:
    return onnx.load(Bundle.open(bundle).graph(precision, layout), load_external_data=False).graph


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize(
    "name",
    [
        "llama-biased-llama3",
        "mistral-window",
        "qwen2",
        "qwen2-yarn-bf16",
        "qwen3-biased",
        "gemma3",
        "gemma3-softcap-linear",
        "phi3",
        "phi4-mini",
    ],
)
def test_vectors_survive(small_models: SmallModels, name: str, precision: str, layout: Layout) -> None:
    found = embed(small_models.bundle(name, precisions=ALL), precision, layout)
    # Up to the second step: these random models are chaotic. One text of qwen2-yarn-bf16 has a cosine of 0.988 after
    # five steps in FP32 when its weights are changed by no more than a rounding to BF16.
    cosines = row_cosine(found, reference(small_models, name))[:, :3]
    assert cosines.min() > LOW_PRECISION_MIN_COSINE[precision]


def element_types(graph: onnx.GraphProto) -> dict[str, int]:
    """Return the element type of every value that has one."""
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    return types


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", ["llama-biased-llama3", "qwen3", "gemma3-softcap-linear", "phi4-mini"])
def test_the_islands_are_where_the_rules_say(
    small_models: SmallModels, name: str, precision: str, layout: Layout
) -> None:
    graph = load_graph(small_models.bundle(name, precisions=ALL), precision, layout)
    types = element_types(graph)
    weights = {tensor.name for tensor in graph.initializer}
    seen: Counter[str] = Counter()
    for node in graph.node:
        floats = [types[name] for name in node.input if types.get(name) in (TensorProto.FLOAT, LOW[precision])]
        if node.op_type == "Cast" or not floats:
            continue
        assert len(set(floats)) == 1, node  # strongly typed: nothing mixes
        biased = node.op_type == "Add" and len(weights.intersection(node.input)) == 1
        scaled = node.op_type == "Mul" and bool(weights.intersection(node.input))
        low = {"MatMul", "Gemm", "Attention", "RotaryEmbedding"} | ({"Sigmoid"} if precision == "fp16" else set())
        float32 = {"RMSNormalization", "Softmax", "ReduceL2", "Div", "CumSum", "Min", "Gelu", "Tanh"}
        float32 |= {"Sigmoid"} if precision == "bf16" else set()
        if node.op_type in low or biased:
            assert floats[0] == LOW[precision], node
        elif node.op_type in float32 or (node.op_type == "Add" and not biased) or scaled:
            assert floats[0] == TensorProto.FLOAT, node
        seen[node.op_type] += 1
    assert min(seen[kind] for kind in ("MatMul", "Gemm", "Attention", "RMSNormalization", "Softmax", "Add")) > 0
    io = [value for value in (*graph.input, *graph.output) if not value.name.startswith(("past.", "present."))]
    assert {types[value.name] for value in io} <= {TensorProto.FLOAT, TensorProto.INT64}


@pytest.mark.parametrize("precision", LOW)
def test_rewrites_are_counted(small_models: SmallModels, precision: str) -> None:
    variant = Bundle.open(small_models.bundle("llama", precisions=ALL)).manifest.variants[precision]
    unrolled, stepwise = variant.rewrites[Layout.UNROLLED], variant.rewrites[Layout.STEPWISE]
    layers, passes = 2, STEPS + 1
    assert unrolled["MatMul"] == 7 * layers * passes + STEPS
    assert stepwise["MatMul"] == 7 * layers + 1
    assert (unrolled["Attention"], stepwise["Attention"]) == (layers * passes, layers)
    assert (unrolled["RotaryEmbedding"], stepwise["RotaryEmbedding"]) == (2 * layers * passes, 2 * layers)
    assert (unrolled["Gemm"], stepwise["Gemm"]) == (STEPS, 1)
    if precision == "fp16":
        assert (unrolled["scale_mixture"], stepwise["scale_mixture"]) == (STEPS, 1)
        assert stepwise["Sigmoid"] == layers
    else:
        assert "scale_mixture" not in unrolled
        assert "Sigmoid" not in stepwise
    assert "SwiGLU" in variant.float32 or precision == "fp16"
    assert "residual stream" in variant.float32


def test_weights_are_stored_low_but_norms(small_models: SmallModels) -> None:
    bundle = Bundle.open(small_models.bundle("llama", precisions=ALL))
    sizes = {name: bundle.manifest.files[f"{name}/weights.bin"].bytes for name in ALL}
    assert sizes["fp16"] == sizes["bf16"] < sizes["fp32"]
    graph = load_graph(bundle.directory, "fp16", Layout.STEPWISE)
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert types["model.norm.weight"] == TensorProto.FLOAT
    assert types["model.embed_tokens.weight"] == TensorProto.FLOAT16
    assert types["rotary.cos"] == TensorProto.FLOAT16


def test_another_activation_than_swiglu(small_models: SmallModels, tmp_path: Path) -> None:
    """Without a Sigmoid there is none to rewrite; the product of a GELU stays in FP32."""
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "bundle"
    shutil.copytree(small_models.checkpoint("llama"), checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    export_bundle(
        ExportOptions(output=output, steps=STEPS, model=str(checkpoint), max_tokens=48, precisions=(Precision.FP16,))
    )
    prompt, steps = expected(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval())
    wanted = np.concatenate([prompt[:, None], steps], axis=1)
    cosines = row_cosine(embed(output, "fp16", Layout.STEPWISE), wanted)[:, :3]  # see test_vectors_survive
    assert cosines.min() > LOW_PRECISION_MIN_COSINE["fp16"]


def test_a_rewrite_that_finds_nothing_is_an_error() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((2,)))
    node = ir.node("Relu", [x])
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 23})
    with pytest.raises(ExportError, match=r"--precision fp16 finds no MatMul to rewrite; every decoder has one"):
        set_precision(ir.Model(graph, ir_version=10), Precision.FP16)


def test_scaled_mixture_keeps_small_probabilities() -> None:
    """What the scale is for: the tail of a softmax over 150,000 tokens, most of it below FP16's normal numbers."""
    probabilities = np.geomspace(3e-8, 1, 1000).astype(np.float32)
    scaled = (probabilities * np.float32(MIXTURE_SCALE)).astype(np.float16).astype(np.float32) / MIXTURE_SCALE
    plain = probabilities.astype(np.float16).astype(np.float32)
    assert np.abs(scaled / probabilities - 1).max() < 2**-10.9
    assert np.abs(plain / probabilities - 1).max() > 0.1


def test_keep_float32(small_models: SmallModels) -> None:
    bundle = small_models.bundle("llama", precisions=("fp16",), keep_float32=("layers.1.mlp",))
    types = {tensor.name: tensor.data_type for tensor in load_graph(bundle, "fp16", Layout.UNROLLED).initializer}
    assert types["model.layers.1.mlp.down_proj.weight.T"] == TensorProto.FLOAT
    assert types["model.layers.0.mlp.down_proj.weight.T"] == TensorProto.FLOAT16
    assert "layers.1.mlp" in Bundle.open(bundle).manifest.variants["fp16"].float32
    for layout in Layout:
        cosine = row_cosine(embed(bundle, "fp16", layout), reference(small_models, "llama")).min()
        assert cosine > LOW_PRECISION_MIN_COSINE["fp16"]


def test_keep_float32_of_the_vocabulary(small_models: SmallModels) -> None:
    bundle = small_models.bundle("llama", precisions=("fp16",), keep_float32=("embed_tokens",))
    cosine = row_cosine(embed(bundle, "fp16", Layout.STEPWISE), reference(small_models, "llama")).min()
    assert cosine > LOW_PRECISION_MIN_COSINE["fp16"]


def test_keep_float32_of_values(small_models: SmallModels) -> None:
    """The KV cache holds them in FP16 all the same: a step reads what the one before it has written."""
    bundle = small_models.bundle("llama", precisions=("fp16",), keep_float32=("v_proj",))
    for layout in Layout:
        cosine = row_cosine(embed(bundle, "fp16", layout), reference(small_models, "llama")).min()
        assert cosine > LOW_PRECISION_MIN_COSINE["fp16"]


def test_keep_float32_that_matches_nothing(small_models: SmallModels, tmp_path: Path) -> None:
    options = ExportOptions(
        output=tmp_path / "out",
        steps=1,
        model=str(small_models.checkpoint("llama")),
        max_tokens=16,
        precisions=(Precision.FP16,),
        keep_float32=("layers.9.",),
    )
    with pytest.raises(
        OptionError, match=r"--keep-float32 layers\.9\. matches no weight; it takes a part of a name such as model"
    ):
        export_bundle(options)
    assert not (tmp_path / "out").exists()
