"""Where a decoder quantizes: every input of matrix products that INT8 variants turn into integers, and how.

A layer has four such inputs, each read by one to three projections, which share its integers. The vocabulary projection,
which reads the state of one position, is the fifth kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class InputKind(StrEnum):
    """What is quantized."""

    ATTENTION_INPUT = "attention_input"
    ATTENTION_OUTPUT = "attention_output"
    MLP_INPUT = "mlp_input"
    MLP_OUTPUT = "mlp_output"
    VOCABULARY = "vocabulary"


@dataclass(frozen=True)
class QuantizedInput:
    """One quantized input.

    Attributes:
        name: such as ``model.layers.3.mlp_output``.
        kind: what it is.
        projections: modules that read it, such as ``model.layers.3.mlp.down_proj``.
    """

    name: str
    kind: InputKind
    projections: tuple[str, ...]


LIMBS: Mapping[InputKind, int] = {
    InputKind.ATTENTION_INPUT: 1,
    InputKind.ATTENTION_OUTPUT: 2,
    InputKind.MLP_INPUT: 1,
    InputKind.MLP_OUTPUT: 2,
    InputKind.VOCABULARY: 2,
}
"""Digits of each kind in ``int8``: 1 for 8 bits; 2 for 16 bits, two rows of 8 bits that one integer product reads,
x / scale = hi + lo / 254. Scales are static. What RMSNorm made differs little from token to token once it is smoothed;
SwiGLU's product differs a thousandfold, attention's output cannot be smoothed, and the vocabulary decides the soft token."""

OUTLIER_CHANNELS: Mapping[InputKind, int] = {
    InputKind.ATTENTION_INPUT: 8,
    InputKind.ATTENTION_OUTPUT: 0,
    InputKind.MLP_INPUT: 0,
    InputKind.MLP_OUTPUT: 8,
    InputKind.VOCABULARY: 0,
}
"""Channels of each input that may stay in float: those with the largest values. Two narrow products beside the integer one
(T. Dettmers et al., LLM.int8(), arXiv 2208.07339, with channels fixed by calibration). The MLP's input has none,
because its product is the widest and the extra sum costs most there; attention's output has a second digit instead."""

_PROJECTIONS = {
    InputKind.ATTENTION_INPUT: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    InputKind.ATTENTION_OUTPUT: ("self_attn.o_proj",),
    InputKind.MLP_INPUT: ("mlp.gate_proj", "mlp.up_proj"),
    InputKind.MLP_OUTPUT: ("mlp.down_proj",),
}

SMOOTHED = frozenset(kind for kind, limbs in LIMBS.items() if limbs == 1)
"""Kinds that are smoothed; their scales fold into the weight of RMSNorm. With two limbs the activation is no longer what
errs, and smoothing only moves outliers into the weight (demo: 0.964 overlap without, 0.950 with)."""

JOINED = frozenset({InputKind.ATTENTION_INPUT})
"""Kinds whose projections lie side by side in one integer product: those of queries, keys and values are so narrow that a
product less saves more than taking them apart again costs. Gate and up are wide."""

VOCABULARY_INPUT = QuantizedInput("lm_head", InputKind.VOCABULARY, ("lm_head",))


def layer_inputs(layer: int) -> tuple[QuantizedInput, ...]:
    """Return the four sites of a decoder layer, in the order of the computation."""
    block = f"model.layers.{layer}"
    return tuple(
        QuantizedInput(f"{block}.{kind}", kind, tuple(f"{block}.{name}" for name in names))
        for kind, names in _PROJECTIONS.items()
    )


def decoder_inputs(num_layers: int) -> tuple[QuantizedInput, ...]:
    """Return every site of a decoder, the vocabulary projection last."""
    return (*(site for layer in range(num_layers) for site in layer_inputs(layer)), VOCABULARY_INPUT)
