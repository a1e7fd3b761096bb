"""config.json is read as transformers reads it; what that would lose is refused by name or named in a warning."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_models import CONFIGS, GEMMA_LAYERS, LINEAR_ROPE, LONG_ROPE, YARN_ROPE
from transformers import AutoConfig, Gemma3Config

from gircse.checkpoint.model_config import read_model_config
from gircse.runtime.errors import CheckpointError


def write(directory: Path, name: str, **changes: Any) -> Path:
    """Write the config of a small model; a change to None removes the field."""
    fields = json.loads(CONFIGS[name]().to_json_string(use_diff=False)) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return directory


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_what_transformers_reads(tmp_path: Path, name: str) -> None:
    ours, theirs = read_model_config(write(tmp_path, name)), AutoConfig.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    ignored = {"dtype", "_name_or_path", "use_cache", "return_dict", "output_hidden_states"}
    wanted = {key: value for key, value in theirs.to_dict().items() if key not in ignored}
    assert {key: value for key, value in ours.to_dict().items() if key not in ignored} == wanted


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_implementation", "flash_attention_2"),
        ("_attn_implementation", "flash_attention_2"),
        ("_attn_implementation_internal", "flash_attention_3"),
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("return_dict", False),
        ("use_cache", False),
        ("torch_dtype", "float8_e4m3fn"),
        ("dtype", "auto"),
        ("pretraining_tp", 4),
        ("is_decoder", True),
        ("gradient_checkpointing", True),
    ],
)
def test_fields_of_how_it_runs_are_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, field: str, value: object
) -> None:
    plain = read_model_config(write(tmp_path, "llama")).to_dict()
    assert read_model_config(write(tmp_path, "llama", **{field: value})).to_dict() == plain
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama", "is_causal", False),
        ("llama", "use_bidirectional_attention", True),
        ("llama", "sliding_window", 16),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "rope_interleaved", True),
        ("llama", "logit_scale", 0.5),
        ("llama", "embedding_multiplier", 12.0),
        ("llama", "num_local_experts", 8),
        ("llama", "add_cross_attention", True),
        ("llama", "layer_types", ["sliding_attention", "full_attention"]),
        ("llama", "kv_sharing_modes", ["reuse", "reuse"]),
        ("llama", "unpadded_vocab_size", 512),
        ("mistral-window", "layer_types", ["full_attention", "sliding_attention"]),
        ("phi3", "lm_head_bias", True),
        ("qwen3", "num_experts", 128),
        ("qwen3", "attention_sinks", True),
        ("gemma3", "use_bidirectional_attention", True),
        ("gemma3", "attn_logit_softcapping", 50.0),
    ],
)
def test_a_field_that_would_be_lost_is_refused_by_name(tmp_path: Path, name: str, field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json has {field} = {re.escape(repr(value))}; a decoder of"):
        read_model_config(write(tmp_path, name, **{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("is_causal", True), ("num_experts", 0), ("quantization_config", {}), ("sliding_window", 0), ("moe_layers", [])],
)
def test_a_neutral_value_is_taken(tmp_path: Path, field: str, value: object) -> None:
    assert read_model_config(write(tmp_path, "llama", **{field: value})).hidden_size == 48


def test_other_unknown_fields_are_named_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_model_config(write(tmp_path, "llama", unsloth_version="2025.1", nothing=0, architectures=["X"]))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'config.json'}: transformers does not use unsloth_version for llama"
    ]


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="weights are quantized"):
        read_model_config(write(tmp_path, "llama", quantization_config={"quant_method": "gptq"}))


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4}, LINEAR_ROPE),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, LINEAR_ROPE),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
            YARN_ROPE,
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {"rope_type": "dynamic", "factor": 2.0}),
    ],
)
def test_old_spellings_of_rotary_scalings(tmp_path: Path, spelled: dict, meant: dict) -> None:
    config = read_model_config(write(tmp_path, "llama", rope_parameters=None, **spelled))
    assert {"rope_theta": 1e4, **meant}.items() <= config.rope_parameters.items()


def test_the_first_spelling_of_longrope(tmp_path: Path) -> None:
    old = {"type": "su", "short_factor": LONG_ROPE["short_factor"], "long_factor": LONG_ROPE["long_factor"]}
    directory = write(tmp_path, "phi4-mini", rope_parameters=None, rope_scaling=old, partial_rotary_factor=0.75)
    found = read_model_config(directory).rope_parameters
    assert LONG_ROPE.items() <= found.items()
    assert found["original_max_position_embeddings"] == 64


def test_rotary_scalings_of_layer_types(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = {"rope_scaling": scaling, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    config = read_model_config(write(tmp_path, "gemma3", rope_parameters=None, **old))
    assert config.rope_parameters == {
        "full_attention": {"rope_theta": 1e6, **scaling},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "llama",
            {"rope_type": "mrope", "mrope_section": [2, 2]},
            r"the rotary scaling 'mrope'; supported are default, ",
        ),
        ("llama", {"rope_type": "su", "factor": 2.0}, r"the rotary scaling 'su'; supported are"),
        ("llama", {"rope_type": "default", "mrope_section": [2, 2]}, r"has rope_parameters\.mrope_section = \[2, 2\]"),
        ("llama", {"factor": 2.0}, r"has rope_parameters\.factor = 2\.0"),  # without a type, transformers ignores it
        ("llama", {"rope_type": "llama3", "factor": 2.0}, r"cannot be read by transformers: Missing required keys"),
        ("llama", {"full_attention": LINEAR_ROPE}, r"has rope_parameters\.full_attention = "),
        ("gemma3", LINEAR_ROPE, r"has rope_parameters\.rope_type = 'linear'"),
        ("gemma3", {"full_attention": {"rope_type": "mrope"}}, r"the rotary scaling 'mrope'"),
        ("llama", {"rope_type": ["linear"], "factor": 2.0}, r"the rotary scaling \['linear'\]; supported are"),
        ("gemma3", {"full_attention": LINEAR_ROPE, "sliding_attention": 3}, r"config\.json "),
        ("phi3", LINEAR_ROPE, r"must be one of \['longrope'\], got linear"),
    ],
)
def test_rotary_scalings_that_are_not_computed_are_refused(
    tmp_path: Path, name: str, parameters: dict, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_model_config(write(tmp_path, name, rope_parameters=parameters))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, r"'gemma2'; supported are llama, mistral, qwen2, qwen3, gemma3_text, phi3, and"),
        ({"model_type": "qwen2_5_vl"}, r"has the architecture 'qwen2_5_vl'; supported are"),
        ({"hidden_size": "48"}, r"cannot be read by transformers: .*'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, r"cannot be read by transformers: integer modulo by zero"),
        ({"num_key_value_heads": 4}, r"has num_key_value_heads = 4; it has to be a divisor of the 6 heads"),
        ({"num_hidden_layers": 10**7}, r"has num_hidden_layers = 10000000; it has to be 1 to 1024"),
        ({"vocab_size": -1}, r"has vocab_size = -1; it has to be at least 1"),
        ({"rms_norm_eps": float("nan")}, r"has rms_norm_eps = nan"),
        ({"hidden_act": "softsign"}, r"has hidden_act = softsign; it has to be one of silu"),
    ],
)
def test_a_config_that_is_no_decoder_of_ours(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_model_config(write(tmp_path, "llama", **changes))


def test_a_multimodal_gemma_is_read_as_its_text_part(tmp_path: Path) -> None:
    text = CONFIGS["gemma3"]()
    Gemma3Config(text_config=text.to_dict(), vision_config={"num_hidden_layers": 1}).save_pretrained(tmp_path)
    found = read_model_config(tmp_path)
    assert (found.model_type, found.layer_types, found.tie_word_embeddings) == ("gemma3_text", GEMMA_LAYERS, True)
    assert found.rope_parameters == text.rope_parameters
    assert found.hidden_size == 48


def test_a_multimodal_model_without_its_text_part(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    with pytest.raises(CheckpointError, match=r"'gemma3' with no text_config of type gemma3_text"):
        read_model_config(tmp_path)


def test_the_dtype_of_a_checkpoint_is_not_that_of_the_reference(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path, "qwen2-yarn-bf16"))
    assert config.dtype in (None, torch.float32)


ADOPTED = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}


def test_code_that_transformers_has_adopted_is_not_needed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = write(tmp_path, "phi3", auto_map=ADOPTED | {"AutoTokenizer": "Xenova/gpt-4o"})
    assert not hasattr(read_model_config(directory), "auto_map")
    assert "its code (auto_map) is not executed; the phi3 of transformers is" in caplog.text


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("phi3", {"AutoModelForCausalLM": "modeling_phi3.Phi3Bidirectional"}),
        ("qwen2", {"AutoModel": "modeling_qwen.Qwen2Model"}),  # gte-Qwen2: the name is transformers' own, the code not
        ("phi3", ["Phi3Config"]),
    ],
)
def test_other_code_is_refused(tmp_path: Path, name: str, code: object) -> None:
    with pytest.raises(CheckpointError, match=r"needs code of its own \(auto_map\); code of a checkpoint is never"):
        read_model_config(write(tmp_path, name, auto_map=code))


def test_a_head_size_is_read_where_the_class_does_not_declare_it(tmp_path: Path) -> None:
    assert read_model_config(write(tmp_path, "qwen2", head_dim=16)).head_dim == 16
