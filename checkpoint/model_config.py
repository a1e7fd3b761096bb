"""Reads config.json: the decoder that it describes, exactly as ``transformers`` builds it, or a refusal that says why.

Trace, PyTorch reference and calibration read their config here, so that they see the same model. Fields of a config
fall into four groups: those that only choose how Hugging Face runs are dropped; those that the config class of the
architecture declares are honoured by its code, which trace and reference both run; those that would change the result
but that this code ignores are refused by name; the rest is named in a warning.
"""

import logging
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gircse.checkpoint.silence import quiet_transformers
from gircse.checkpoint.source import read_json
from gircse.runtime.errors import CheckpointError, readable, reason_of

logger = logging.getLogger(__name__)

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")

MAX_LAYERS, MAX_SIZE = 1024, (1 << 31) - 1

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

TEXT_PARTS = {"gemma3": "gemma3_text"}
"""Multimodal architectures whose text part is a supported decoder of its own."""

ADOPTED_CODE = {"phi3": ("Phi3Config", "Phi3Model", "Phi3ForCausalLM")}
"""Classes whose code Microsoft's checkpoints bring along. Other authors use the names of transformers' own classes for
code that attends in both directions."""

_ROTARY_FIELDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset({"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    "longrope": frozenset({"factor", "attention_factor", "short_factor", "long_factor"}),
}
"""Rotary scalings, each with the fields that ``transformers`` reads beside ``_ROTARY_BASICS``."""

_ROTARY_BASICS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}

_HOW_IT_RUNS = {
    "auto_map",  # see ADOPTED_CODE
    "_attn_implementation",
    "_attn_implementation_internal",
    "attn_implementation",
    "dtype",  # weights are read in FP32
    "gradient_checkpointing",
    "is_decoder",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "return_dict",
    "torch_dtype",
    "torchscript",
    "use_cache",
    "use_return_dict",
}
"""Fields that choose code, an output format or a type, not a result."""

_READ_UNDECLARED = {
    "head_dim",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_theta",
    "sliding_window_pattern",
}
"""Fields that ``transformers`` reads also where the config class does not declare them: mostly old spellings."""

_MUST_BE: Mapping[str, Any] = {
    "add_cross_attention": False,
    "configuration_files": None,  # of which transformers may read another
    "is_causal": True,
    "is_encoder_decoder": False,
    "kv_sharing_modes": None,
    "per_layer_config": None,
    "unpadded_vocab_size": None,
    "use_bidirectional_attention": False,
    # Gemma 3's code has stored it and never used it, so what it should do there is not known.
    "attn_logit_softcapping": None,
}
"""Fields that have a config class or code of ``transformers`` behind them, with the value that the graphs compute."""

_CHANGES_RESULT = re.compile(
    "alibi|bidirectional|causal|chunk|clip|cross_attention|expert|interleav|layer_types|lm_head|moe|multiplier|mup|nope|no_rope|"
    "parallel|qk_norm|quant|rope|rotary|scal|sink|softcap|window"
)
"""Marks of fields that models of other architectures compute with."""

_HARMLESS = {"architectures", "max_window_layers", "model_type", "transformers_version"}
"""Fields that are not worth a warning; layers have no window where the config class knows of none."""


def read_model_config(directory: Path) -> Any:
    """Read the config of a checkpoint's decoder.

    Args:
        directory: holds config.json.

    Returns:
        A ``transformers`` config of a type in ``SUPPORTED``: that of the text part where the checkpoint has more.

    Raises:
        CheckpointError: config.json is missing or damaged, or describes what cannot be computed.
    """
    where = str(directory / "config.json")
    fields = _decoder_fields(read_json(directory / "config.json"), where)
    kept = {name: value for name, value in fields.items() if name not in _HOW_IT_RUNS}
    if kept.get("quantization_config"):
        raise CheckpointError(
            where,
            "says that the weights are quantized (quantization_config)",
            "an export reads FP32, FP16 or BF16",
            "Use the checkpoint from before quantization.",
        )
    for name, wanted in _MUST_BE.items():
        if kept.get(name) not in (None, wanted, [], {}):
            raise _refused(where, name, kept[name])
    config = _build(kept, where)
    _check_sizes(config, where)
    _check_rotary(config, where)
    return config


def _decoder_fields(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of the decoder: all of them, or those of a multimodal model's text part."""
    model_type, code = raw.get("model_type"), raw.get("auto_map")
    if model_type is None or (code and not _is_own_code(str(model_type), code)):
        raise CheckpointError(
            where,
            "names no model_type" if model_type is None else "needs code of its own (auto_map)",
            "code of a checkpoint is never executed",
            "Use a checkpoint of a supported architecture.",
        )
    if code:
        logger.warning("%s: its code (auto_map) is not executed; the %s of transformers is", where, model_type)
    text_type = TEXT_PARTS.get(str(model_type))
    if text_type is None:
        if model_type not in SUPPORTED:
            raise CheckpointError(
                where,
                f"has the architecture {model_type!r}",
                f"supported are {', '.join(SUPPORTED)}, and the text part of {', '.join(TEXT_PARTS)}",
                "Use a model of one of these.",
            )
        return raw
    fields = raw.get("text_config")
    if not isinstance(fields, dict) or fields.get("model_type", text_type) != text_type:
        raise CheckpointError(
            where,
            f"has the architecture {model_type!r} with no text_config of type {text_type}",
            None,
            "Use a checkpoint that transformers saved.",
        )
    outer = {name: raw[name] for name in ("quantization_config", "tie_word_embeddings") if name in raw}
    return {**outer, **fields, "model_type": text_type}


def _is_own_code(model_type: str, code: Any) -> bool:
    """Whether the code that a checkpoint brings is what transformers has adopted since."""
    names = ADOPTED_CODE.get(model_type, ())
    return isinstance(code, dict) and all(
        auto == "AutoTokenizer" or str(name).rpartition(".")[2] in names for auto, name in code.items()
    )


def _build(fields: dict[str, Any], where: str) -> Any:
    """Build the config of the fields that ``transformers`` reads, whatever its validators raise."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[fields["model_type"]]
    read = {*config_class.__dataclass_fields__, *_READ_UNDECLARED}
    _check_unread(fields.keys() - read, fields, where)
    _translate_old_longrope(fields)
    try:
        with quiet_transformers():
            return config_class(**{name: value for name, value in fields.items() if name in read})
    except Exception as err:
        raise CheckpointError(
            where, f"cannot be read by transformers: {reason_of(err)}", None, "Replace the file, or correct the field."
        ) from err


def _check_unread(names: Collection[str], fields: Mapping[str, Any], where: str) -> None:
    """Refuse fields that nothing would read and that sound like arithmetic; warn of the others."""
    unread = sorted(name for name in names if fields[name] and not name.startswith("_"))
    for name in unread:
        if _CHANGES_RESULT.search(name) and name not in _MUST_BE.keys() | _HARMLESS:
            raise _refused(where, name, fields[name])
    if noteworthy := [name for name in unread if name not in _MUST_BE.keys() | _HARMLESS]:
        unused = readable(", ".join(noteworthy))
        logger.warning("%s: transformers does not use %s for %s", where, unused, fields["model_type"])


def _translate_old_longrope(fields: dict[str, Any]) -> None:
    """Rename the type that Phi's first configs gave their scaling; transformers means to, but asks for more first."""
    rotary = fields.get("rope_scaling")
    if fields["model_type"] == "phi3" and isinstance(rotary, dict) and rotary.get("type") in ("su", "yarn"):
        fields["rope_scaling"] = {**rotary, "type": "longrope"}


def _check_sizes(config: Any, where: str) -> None:
    """Refuse sizes that no decoder has: some of them would only be noticed as a crash, or not within a day."""
    layers, heads, kv_heads = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    activation = config.hidden_activation if hasattr(config, "hidden_activation") else config.hidden_act
    softcap = getattr(config, "final_logit_softcapping", None)
    sizes = ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "num_attention_heads")
    checks = [(size, getattr(config, size), 1 <= getattr(config, size) <= MAX_SIZE, "at least 1") for size in sizes]
    checks += [
        ("num_hidden_layers", layers, 1 <= layers <= MAX_LAYERS, f"1 to {MAX_LAYERS}"),
        ("num_key_value_heads", kv_heads, kv_heads >= 1 and heads % kv_heads == 0, f"a divisor of the {heads} heads"),
        ("head_dim", head_dim, head_dim >= 2 and head_dim % 2 == 0, "even"),
        ("rms_norm_eps", config.rms_norm_eps, 0 <= config.rms_norm_eps < 1, "0 or a little more"),
        ("hidden_act", activation, activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
        ("final_logit_softcapping", softcap, softcap is None or 0 < softcap < math.inf, "above 0"),
    ]
    for name, value, fits, allowed in checks:
        if not fits:
            raise CheckpointError(where, f"has {name} = {value}", f"it has to be {allowed}", "Replace the file.")


def _check_rotary(config: Any, where: str) -> None:
    """Refuse rotary scalings, and fields of them, that ``transformers`` does not compute for this architecture."""
    parameters = config.rope_parameters
    nested = config.nested_rope_parameter_keys(parameters)
    for name, value in parameters.items() if nested else ():
        if name not in nested and value and not isinstance(value, dict):
            raise _refused(where, f"rope_parameters.{name}", value)
    for rotary in [parameters[key] for key in nested] or [parameters]:
        if not isinstance(rotary, dict):
            raise _refused(where, "rope_parameters", parameters)
        if str(rotary["rope_type"]) not in _ROTARY_FIELDS:
            raise CheckpointError(
                where,
                f"has the rotary scaling {rotary['rope_type']!r}",
                f"supported are {', '.join(_ROTARY_FIELDS)}",
                "Use a model with one of these.",
            )
        for name, value in rotary.items():
            if value and name not in _ROTARY_BASICS | _ROTARY_FIELDS[rotary["rope_type"]]:
                raise _refused(where, f"rope_parameters.{name}", value)
        # Only Phi's code rotates a part of a head; the others compute something else or nothing with it.
        if config.model_type != "phi3" and rotary.get("partial_rotary_factor") not in (None, 1.0):
            raise _refused(where, "partial_rotary_factor", rotary["partial_rotary_factor"])


def _refused(where: str, name: str, value: Any) -> CheckpointError:
    text = repr(value)
    return CheckpointError(
        where,
        f"has {name} = {text if len(text) < 60 else f'{text[:60]}...'}",
        "a decoder of this architecture is not computed that way",
        "Where the weights were trained with it, this model cannot be used; otherwise remove the field.",
    )
