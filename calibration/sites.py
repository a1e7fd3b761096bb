"""Where a decoder quantises: every input of matrix products that INT8 variants turn into integers, and how.

A layer has four such inputs, each read by one to three projections; the projections of one input are one integer
product. The vocabulary projection, which reads the state of one position, is the fifth kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from gircse.runtime.bundle import Precision


class SiteKind(StrEnum):
    """What is quantised."""

    ATTENTION_INPUT = "attention_input"
    ATTENTION_OUTPUT = "attention_output"
    MLP_INPUT = "mlp_input"
    MLP_OUTPUT = "mlp_output"
    VOCABULARY = "vocabulary"


class Scale(StrEnum):
    """Where the scale of an activation comes from: one calibrated number, or each token's own largest value."""

    STATIC = "static"
    TOKEN = "token"


@dataclass(frozen=True)
class Quantization:
    """How an input becomes integers.

    Attributes:
        scale: whose largest value becomes 127.
        digits: 1 for 8 bits; 2 for 16 bits, written as two rows of 8 bits that one integer product reads:
            x / scale = hi + lo / 254.
    """

    scale: Scale
    digits: int = 1


@dataclass(frozen=True)
class Site:
    """One quantised input.

    Attributes:
        name: such as ``model.layers.3.mlp_output``.
        kind: what it is.
        projections: modules that read it, such as ``model.layers.3.mlp.down_proj``.
    """

    name: str
    kind: SiteKind
    projections: tuple[str, ...]


_STATIC, _TWO_DIGITS = Quantization(Scale.STATIC), Quantization(Scale.STATIC, digits=2)
_BOTH = {
    SiteKind.ATTENTION_INPUT: _STATIC,
    SiteKind.ATTENTION_OUTPUT: _TWO_DIGITS,
    SiteKind.MLP_INPUT: _STATIC,
    SiteKind.VOCABULARY: _TWO_DIGITS,
}
QUANTIZATIONS: Mapping[Precision, Mapping[SiteKind, Quantization]] = {
    Precision.INT8: {**_BOTH, SiteKind.MLP_OUTPUT: _TWO_DIGITS},
    Precision.INT8_DYNAMIC: {**_BOTH, SiteKind.MLP_OUTPUT: Quantization(Scale.TOKEN)},
}
"""How each variant quantises each kind. What RMSNorm made differs little from token to token once it is smoothed, so a
static scale is as good as the token's own there, and cheaper; SwiGLU's product differs a thousandfold. Attention's output,
which cannot be smoothed, gains most by a second digit, and its product is the smallest."""

FLOAT_CHANNELS: Mapping[SiteKind, int] = {
    SiteKind.ATTENTION_INPUT: 8,
    SiteKind.ATTENTION_OUTPUT: 0,
    SiteKind.MLP_INPUT: 0,
    SiteKind.MLP_OUTPUT: 8,
    SiteKind.VOCABULARY: 0,
}
"""Channels of each input that stay in float: those with the largest values. Two narrow products beside the integer one
(T. Dettmers et al., LLM.int8(), arXiv 2208.07339, with channels fixed by calibration). The MLP's input has none,
because its product is the widest and the extra sum costs most there; attention's output has a second digit instead."""

_PROJECTIONS = {
    SiteKind.ATTENTION_INPUT: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    SiteKind.ATTENTION_OUTPUT: ("self_attn.o_proj",),
    SiteKind.MLP_INPUT: ("mlp.gate_proj", "mlp.up_proj"),
    SiteKind.MLP_OUTPUT: ("mlp.down_proj",),
}

SMOOTHED = frozenset({SiteKind.ATTENTION_INPUT, SiteKind.MLP_INPUT, SiteKind.MLP_OUTPUT})
"""Kinds whose scales fold into what comes before: RMSNorm's weight, or the rows of up_proj. Attention's output has no
such place, because groups of query heads share one value head."""

JOINED = frozenset({SiteKind.ATTENTION_INPUT})
"""Kinds whose projections lie side by side in one integer product: those of queries, keys and values are so narrow that a
product less saves more than taking them apart again costs. Gate and up are wide."""

VOCABULARY_SITE = Site("lm_head", SiteKind.VOCABULARY, ("lm_head",))


def layer_sites(layer: int) -> tuple[Site, ...]:
    """Return the four sites of a decoder layer, in the order of the computation."""
    block = f"model.layers.{layer}"
    return tuple(
        Site(f"{block}.{kind}", kind, tuple(f"{block}.{name}" for name in names))
        for kind, names in _PROJECTIONS.items()
    )


def decoder_sites(num_layers: int) -> tuple[Site, ...]:
    """Return every site of a decoder, the vocabulary projection last."""
    return (*(site for layer in range(num_layers) for site in layer_sites(layer)), VOCABULARY_SITE)
