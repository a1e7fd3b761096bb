"""What the trace puts in the place of Hugging Face's code computes the same, and what it cannot replace is refused."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.small_models import CONFIGS, GEMMA_LAYERS, SmallModels

from gircse.export.graph.architecture import decoder_shape
from gircse.export.graph.trace import NORMS, onnx_attention, onnx_rotary, rotary_tables, trace_decoder
from gircse.runtime.errors import ExportError


def kinds_of(model) -> list[tuple[str, ...]]:  # noqa: ANN001
    """Return the extra arguments of Hugging Face's rotary module for each table."""
    return [(kind,) for kind in getattr(model.model.rotary_emb, "layer_types", [])] or [()]


@pytest.mark.parametrize("name", CONFIGS)
def test_rotary_tables_are_hugging_faces_own(small_models: SmallModels, name: str) -> None:
    model = small_models.load(name)
    tables = rotary_tables(model.model, 40)
    kinds = kinds_of(model)
    assert len(tables) == len(kinds)
    for kind in kinds:
        cos, sin = tables["".join(kind)]
        theirs_cos, theirs_sin = model.model.rotary_emb(torch.zeros(1), torch.arange(40)[None], *kind)
        np.testing.assert_array_equal(torch.cat([cos, cos], -1), theirs_cos[0])
        np.testing.assert_array_equal(torch.cat([sin, sin], -1), theirs_sin[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_rotation_is_hugging_faces_own(small_models: SmallModels, name: str) -> None:
    model = small_models.load(name)
    modeling, attention = sys.modules[type(model.model).__module__], model.model.layers[0].self_attn
    heads = attention.config.num_attention_heads
    torch.manual_seed(0)
    q, k = torch.randn(2, heads, 7, attention.head_dim), torch.randn(2, 2, 7, attention.head_dim)
    for kind, (cos, sin) in rotary_tables(model.model, 7).items():
        arguments = [kind] if kind else []
        theirs = modeling.apply_rotary_pos_emb(
            q, k, *model.model.rotary_emb(q, torch.arange(7)[None].expand(2, -1), *arguments)
        )
        ours = onnx_rotary(q, k, cos.expand(2, -1, -1), sin.expand(2, -1, -1))
        for wanted, found in zip(theirs, ours, strict=True):
            torch.testing.assert_close(found, wanted.transpose(1, 2).flatten(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "qwen3", "gemma3", "phi3"])
def test_replaced_norms_are_hugging_faces_own(small_models: SmallModels, name: str) -> None:
    model = small_models.load(name)
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    assert {type(norm).__name__ for norm in norms} <= set(NORMS)
    torch.manual_seed(0)
    for norm in norms:
        hidden = torch.randn(2, 3, len(norm.weight)) * 1e-2  # small, so that a lost epsilon shows
        torch.testing.assert_close(NORMS[type(norm).__name__](norm, hidden), norm(hidden), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"softcap": 50.0}, "softcap = 50.0"),
        ({"s_aux": torch.zeros(6)}, "s_aux = tensor"),
        ({"dropout": 0.1}, "dropout = 0.1"),
        ({"is_causal": False}, "is_causal = False"),
        ({"something_new": True}, "something_new = True"),
    ],
)
def test_an_argument_of_attention_that_the_graph_would_lose_is_refused(arguments: dict, named: str) -> None:
    module = SimpleNamespace(head_dim=4, num_key_value_groups=1)
    states = [torch.randn(1, 3, 8) for _ in range(3)]
    with pytest.raises(ExportError, match=rf"takes {named}.*, which the graphs do not compute"):
        onnx_attention(module, *states, torch.zeros(1, 1, 3, 3), scaling=0.5, **arguments)


def test_empty_and_harmless_arguments_of_attention_are_taken() -> None:
    module = SimpleNamespace(head_dim=4, num_key_value_groups=1, is_causal=True)
    states = [torch.randn(1, 3, 8) for _ in range(3)]
    bias = torch.zeros(1, 1, 3, 3)
    output, _ = onnx_attention(
        module, *states, bias, scaling=0.5, dropout=0.0, softcap=None, sliding_window=9, position_ids=torch.zeros(1)
    )
    q, k, v = (state.unflatten(-1, (2, 4)).transpose(1, 2) for state in states)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
    torch.testing.assert_close(output, wanted.transpose(1, 2).flatten(2))


def test_a_module_with_bidirectional_attention_is_refused() -> None:
    config = CONFIGS["gemma3"]()
    config.use_bidirectional_attention = True
    with pytest.raises(ExportError, match=r"Gemma3Attention takes is_causal = False"):
        trace_decoder(config, decoder_shape(config), positions=16)


def test_an_embedding_that_the_graphs_do_not_scale_is_refused() -> None:
    config = CONFIGS["gemma3"]()
    shape = decoder_shape(CONFIGS["qwen2"]())
    with pytest.raises(ExportError, match=r"has the embedding Gemma3TextScaledWordEmbedding.*rows \* 1 and"):
        trace_decoder(config, shape, positions=16)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("query_pre_attn_scalar", 0, r"config\.json describes a model that cannot be traced: 0.0 cannot be raised"),
        (
            "rope_parameters",
            {kind: {"rope_type": "default", "rope_theta": 0.0} for kind in GEMMA_LAYERS},
            r"config\.json has a rotary scaling with angles that are not finite\. Correct rope_theta\.",
        ),
    ],
)
def test_a_config_of_impossible_numbers_is_an_error_of_ours(field: str, value: object, message: str) -> None:
    config = CONFIGS["gemma3"]()
    setattr(config, field, value)
    with pytest.raises(ExportError, match=message):
        trace_decoder(config, decoder_shape(config), positions=16)
