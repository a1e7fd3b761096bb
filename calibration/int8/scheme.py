"""The INT8 scheme: which inputs of matrix products become integers, how, and the constants of the arithmetic.

A decoder layer has four quantized inputs, each read by one to three projections, which share its integers. The input of
the vocabulary projection, the state of one position, is the fifth kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from gircse.runtime.errors import CalibrationError

INT8_MAX = 127.0
"""Largest level of symmetric INT8; -128 is not used."""

LO_LIMB = 254.0
"""Steps of the lo limb in one step of the hi limb: a remainder of at most half a step becomes at most 127."""

TOP_K = 128
"""Tokens that the soft token of an INT8 variant adds up one by one; the rest is one calibrated vector."""

HIGH_ENTROPY_MASS = 0.35
"""Probability outside the top-k tokens above which the softmax counts as high-entropy and all tokens are added up,
because the calibrated tail is too inaccurate. The softmax of a one-token prompt, which decoder LLMs use as an attention
sink, is an example. Demo: error of the soft token at most 14 % below, 24 % and more above."""


class InputKind(StrEnum):
    """Place of a quantized input in the decoder."""

    ATTENTION_INPUT = "attention_input"
    ATTENTION_OUTPUT = "attention_output"
    MLP_INPUT = "mlp_input"
    MLP_OUTPUT = "mlp_output"
    VOCABULARY = "vocabulary"


@dataclass(frozen=True)
class QuantizedInput:
    """An input of matrix products that INT8 variants quantize.

    Attributes:
        name: such as ``model.layers.3.mlp_output``.
        kind: its place in the decoder.
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
"""Limbs of each kind in ``int8``: 1 for 8 bits; 2 for 16 bits, as a hi and a lo row of 8 bits that one integer product
reads, x / scale = hi + lo / 254. Scales are static. The output of RMSNorm varies little from token to token once it is
smoothed; SwiGLU's product varies a thousandfold, attention's output cannot be smoothed, and the vocabulary decides the
soft token."""

OUTLIER_CHANNELS: Mapping[InputKind, int] = {
    InputKind.ATTENTION_INPUT: 8,
    InputKind.ATTENTION_OUTPUT: 0,
    InputKind.MLP_INPUT: 0,
    InputKind.MLP_OUTPUT: 8,
    InputKind.VOCABULARY: 0,
}
"""How many outlier channels, those with the largest values, may be excluded from quantization: a narrow FP32 product is
added to the integer one (T. Dettmers et al., LLM.int8(), arXiv 2208.07339, here with channels fixed by calibration).
The MLP's input has none, because its product is the widest and the extra sum costs most there; attention's output has a
lo limb instead."""

WEIGHT_OUTLIER_CHANNELS: Mapping[InputKind, int] = {
    InputKind.ATTENTION_INPUT: 8,
    InputKind.ATTENTION_OUTPUT: 0,
    InputKind.MLP_INPUT: 8,
    InputKind.MLP_OUTPUT: 8,
    InputKind.VOCABULARY: 0,
}
"""The same where only weights are rounded. These are not smoothed, and the largest channels of the massive activations
that a first token has are the largest source of error behind every norm: a prompt of one token is lost without them."""

INT4_KINDS = frozenset({InputKind.MLP_INPUT, InputKind.MLP_OUTPUT})
"""Kinds whose weights have 4 bits in ``int4-weights``; those of the others have 8."""

INT4_BLOCKS = (32, 16)
"""Inputs that share a scale of 4-bit weights, the first of them that divides a weight's."""

_PROJECTIONS = {
    InputKind.ATTENTION_INPUT: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    InputKind.ATTENTION_OUTPUT: ("self_attn.o_proj",),
    InputKind.MLP_INPUT: ("mlp.gate_proj", "mlp.up_proj"),
    InputKind.MLP_OUTPUT: ("mlp.down_proj",),
}

SMOOTHED = frozenset(kind for kind, limbs in LIMBS.items() if limbs == 1)
"""Kinds that are smoothed; their scales fold into the weight of RMSNorm. With two limbs the activation is no longer the
source of the error, and smoothing only moves outliers into the weight (demo: 0.964 overlap without, 0.950 with)."""

JOINED = frozenset({InputKind.ATTENTION_INPUT})
"""Kinds whose projections are concatenated into one integer product: those of queries, keys and values are so narrow
that fewer products save more than splitting the result costs. Gate and up are wide."""

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures whose layers consist of these projections, with norms that smoothing can fold into; Phi fuses its
projections, and Gemma normalizes their results and scales its embeddings."""

VOCABULARY_INPUT = QuantizedInput("lm_head", InputKind.VOCABULARY, ("lm_head",))


def layer_inputs(layer: int) -> tuple[QuantizedInput, ...]:
    """Return the four quantized inputs of a decoder layer, in the order of the computation."""
    block = f"model.layers.{layer}"
    return tuple(
        QuantizedInput(f"{block}.{kind}", kind, tuple(f"{block}.{name}" for name in names))
        for kind, names in _PROJECTIONS.items()
    )


def decoder_inputs(num_layers: int) -> tuple[QuantizedInput, ...]:
    """Return every quantized input of a decoder, that of the vocabulary projection last."""
    return (*(found for layer in range(num_layers) for found in layer_inputs(layer)), VOCABULARY_INPUT)


def check_architecture(architecture: str) -> None:
    """Refuse an architecture that INT8 variants do not exist for.

    Raises:
        CalibrationError: it is one.
    """
    if architecture not in ARCHITECTURES:
        raise CalibrationError(
            "INT8",
            f"does not exist for the architecture {architecture!r}",
            f"it does for {', '.join(ARCHITECTURES)}",
            "Export it with --precision fp16 or bf16.",
        )
