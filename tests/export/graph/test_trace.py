"""The traced decoder: compact, standard, free of weights; and what each rewrite did to it."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from support.small_models import CONFIGS, SmallModels
from transformers import AutoConfig

from gircse.export.graph.architecture import check_limits, decoder_shape
from gircse.export.graph.simplify import simplify_decoder
from gircse.export.graph.trace import rotary_tables, trace_decoder
from gircse.runtime import ExportError

LAYERS = 2
# A layer without q/k norms and biases: 7 MatMul, and q, k, v come out of the trace with two transposes and two
# reshapes each, the attention output with one reshape.
PLAIN_REWRITES = {
    "fold_weight_transposes": 7 * LAYERS,
    "cancel_transposes": 3 * LAYERS,
    "collapse_reshapes": 3 * LAYERS,
    "drop_identity_reshapes": 4 * LAYERS,
    "make_reshapes_static": 0,
}
PLAIN_NODES = {
    "MatMul": 7 * LAYERS,
    "RMSNormalization": 2 * LAYERS + 1,
    "RotaryEmbedding": 2 * LAYERS,
    "Attention": LAYERS,
    "Concat": 2 * LAYERS,
    "Add": 2 * LAYERS,
    "Mul": 2 * LAYERS,
    "Sigmoid": LAYERS,
    "Gather": 2,
}


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_every_rewrite_applies_as_often_as_it_should(small_models: SmallModels, name: str) -> None:
    config = AutoConfig.from_pretrained(small_models.checkpoint(name))
    graph = trace_decoder(config, decoder_shape(config), positions=53)
    counts = simplify_decoder(graph)
    assert {key: counts[key] for key in PLAIN_REWRITES} == PLAIN_REWRITES
    assert Counter(node.op_type for node in graph) == PLAIN_NODES
    weights = [value for name, value in graph.initializers.items() if not name.startswith("rotary.")]
    assert len(weights) == 9 * LAYERS + 1
    assert all(value.const_value is None for value in weights)


def test_head_norms_keep_their_reshapes_and_nothing_else(small_models: SmallModels) -> None:
    config = AutoConfig.from_pretrained(small_models.checkpoint("qwen3"))
    graph = trace_decoder(config, decoder_shape(config), positions=53)
    counts = simplify_decoder(graph)
    extra = {"Reshape": 4 * LAYERS, "RMSNormalization": PLAIN_NODES["RMSNormalization"] + 2 * LAYERS}
    assert Counter(node.op_type for node in graph) == PLAIN_NODES | extra
    assert counts["make_reshapes_static"] == 4 * LAYERS


@pytest.mark.parametrize("layout", ["unrolled", "stepwise"])
def test_graphs_are_valid_standard_onnx(small_models: SmallModels, layout: str) -> None:
    for path in (small_models.bundle("qwen2", layout=layout) / "fp32").glob("*.onnx"):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]


def test_graph_grows_linearly_with_steps(small_models: SmallModels) -> None:
    sizes = [
        len(onnx.load(small_models.bundle("qwen2", steps=steps) / "fp32/model.onnx").graph.node) for steps in (3, 4, 5)
    ]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_rotary_tables_are_hugging_faces_own(small_models: SmallModels, name: str) -> None:
    model = small_models.load(name)
    cos, sin = rotary_tables(model.model, 40)
    theirs_cos, theirs_sin = model.model.rotary_emb(torch.zeros(1), torch.arange(40)[None])
    np.testing.assert_array_equal(torch.cat([cos, cos], -1), theirs_cos[0])
    np.testing.assert_array_equal(torch.cat([sin, sin], -1), theirs_sin[0])


@pytest.mark.parametrize(
    ("name", "change", "limits", "match"),
    [
        ("llama", {}, {"steps": 65, "max_tokens": 8}, r"--steps 65 \| 0 to 64"),
        ("llama", {}, {"steps": -1, "max_tokens": 8}, r"--steps -1"),
        ("llama", {}, {"steps": 8, "max_tokens": 0}, r"--max-tokens 0"),
        ("llama", {}, {"steps": 8, "max_tokens": 121}, r"129 positions \| the model has 128 .* 120 or less"),
        ("mistral-window", {}, {"steps": 8, "max_tokens": 57}, r"65 positions \| .* window of 64 .* 56 or less"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            {"steps": 8, "max_tokens": 64},
            None,
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 32,
                }
            },
            {"steps": 8, "max_tokens": 64},
            r"rotary scaling 'dynamic' changes with the length",
        ),
    ],
)
def test_limits(small_models: SmallModels, name: str, change: dict, limits: dict, match: str | None) -> None:
    config = AutoConfig.from_pretrained(small_models.checkpoint(name))
    config.update(change)
    if match is None:
        check_limits(config, **limits)
        return
    with pytest.raises(ExportError, match=match):
        check_limits(config, **limits)


def test_quantized_checkpoints_are_refused(small_models: SmallModels) -> None:
    config = AutoConfig.from_pretrained(small_models.checkpoint("llama"))
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ExportError, match="quantized weights"):
        decoder_shape(config)
