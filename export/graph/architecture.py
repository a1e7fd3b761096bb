"""What the graphs need to know of a config: sizes, and the limits that it sets."""

from dataclasses import dataclass
from typing import Any

from gircse.runtime.errors import OptionError

STATIC_ROTARY_TYPES = ("default", "linear", "llama3", "yarn")
"""Scalings whose angles do not depend on the length of the prompt; ``dynamic`` and ``longrope`` do."""


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that the graphs and the manifest need.

    Attributes:
        architecture: ``model_type`` of the config.
        hidden_size: width of the residual stream.
        num_layers: decoder layers.
        num_kv_heads: key and value heads.
        head_dim: width of a head.
        vocab_size: rows of the embedding table.
        tied: whether lm_head is the embedding table.
        embedding_scale: what the rows of the table are multiplied by where they stand for tokens of the prompt. Soft
            tokens are sums of the bare rows, as in the official code, which multiplies with the table itself.
        logit_softcap: c of c * tanh(logits / c), or None.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    embedding_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def kv_size(self) -> int:
        """Width of the keys, and of the values, of one token in one layer."""
        return self.num_kv_heads * self.head_dim


def decoder_shape(config: Any) -> DecoderShape:
    """Return the sizes of a config of ``read_model_config``."""
    return DecoderShape(
        architecture=config.model_type,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        embedding_scale=config.hidden_size**0.5 if config.model_type == "gemma3_text" else 1.0,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )


def check_limits(config: Any, *, steps: int, max_tokens: int) -> None:
    """Refuse K and prompt lengths that the model cannot hold.

    Raises:
        OptionError: too many positions, a sliding window that would cut the prompt, or a rotary scaling whose angles
            would change with the length of the prompt.
    """
    positions = max_tokens + steps
    if positions > config.max_position_embeddings:
        raise OptionError(
            f"--max-tokens {max_tokens}",
            f"with {steps} steps makes {positions} positions",
            f"the model has {config.max_position_embeddings}",
            f"Lower --max-tokens to {config.max_position_embeddings - steps} or less.",
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and _uses_sliding_window(config) and positions > window:
        raise OptionError(
            f"--max-tokens {max_tokens}",
            f"with {steps} steps makes {positions} positions",
            f"the sliding window of the model holds {window}",
            f"Lower --max-tokens to {window - steps} or less.",
        )
    _check_rotary(config, positions, max_tokens)


def _uses_sliding_window(config: Any) -> bool:
    layer_types = getattr(config, "layer_types", None)
    return layer_types is None or "sliding_attention" in layer_types


def _check_rotary(config: Any, positions: int, max_tokens: int) -> None:
    per_layer_type = [config.rope_parameters[key] for key in config.nested_rope_parameter_keys(config.rope_parameters)]
    for rotary in per_layer_type or [config.rope_parameters]:
        kind = rotary["rope_type"]
        original = rotary.get("original_max_position_embeddings") or config.max_position_embeddings
        if kind not in STATIC_ROTARY_TYPES and positions > original:
            raise OptionError(
                f"--max-tokens {max_tokens}",
                f"with {positions - max_tokens} steps makes {positions} positions",
                f"the model's rotary scaling {kind!r} changes with the length beyond {original}, which only "
                f"{', '.join(STATIC_ROTARY_TYPES)} do not",
                f"Lower --max-tokens to {original - positions + max_tokens} or less.",
            )
