"""What each rewrite does to a traced decoder, which becomes compact and stays free of weights."""

from collections import Counter

import pytest
from support.small_models import SmallModels
from transformers import AutoConfig

from gircse.export.graph.architecture import decoder_shape
from gircse.export.graph.simplify import simplify_decoder
from gircse.export.graph.trace import trace_decoder

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


def test_gemma_norms_take_no_transposes(small_models: SmallModels) -> None:
    config = AutoConfig.from_pretrained(small_models.checkpoint("gemma3"))
    graph = trace_decoder(config, decoder_shape(config), positions=53)
    counts = simplify_decoder(graph)
    norms = 6 * LAYERS + 1  # before and after attention and MLP, q and k
    assert counts["move_transposes_past_norms"] == 2 * LAYERS
    assert counts["cancel_transposes"] == 3 * LAYERS
    assert Counter(node.op_type for node in graph) == {
        "MatMul": 7 * LAYERS,
        "RMSNormalization": norms,
        "Add": 2 * LAYERS + norms,  # norms add 1 to their weight
        "RotaryEmbedding": 2 * LAYERS,
        "Attention": LAYERS,
        "Concat": 2 * LAYERS,
        "Reshape": 4 * LAYERS,
        "Gelu": LAYERS,
        "Mul": LAYERS,
        "Gather": 4,  # cosines and sines of local and of global layers
    }
    tables = [node.inputs[0].name for node in graph if node.op_type == "Gather"]
    kinds = ("sliding_attention", "full_attention")  # in one order, whatever the hashes of strings are
    assert tables == [f"rotary.{kind}.{part}" for kind in kinds for part in ("cos", "sin")]


def test_fused_projections_are_cut_in_one_node_each(small_models: SmallModels) -> None:
    config = AutoConfig.from_pretrained(small_models.checkpoint("phi3"))
    graph = trace_decoder(config, decoder_shape(config), positions=53)
    counts = simplify_decoder(graph)
    assert counts["drop_identities"] == 2 * LAYERS  # dropouts
    expected = PLAIN_NODES | {"MatMul": 4 * LAYERS, "Slice": 3 * LAYERS, "Split": LAYERS}
    assert Counter(node.op_type for node in graph) == expected
