"""Judge measured magnitudes: which values come too near the FP16 maximum, with the fix for each."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gircse.export.graph.mixed_precision import FP16_MAX
from gircse.export.overflow_probe import Magnitudes
from gircse.runtime.errors import sentence
from gircse.runtime.precision import SPECS, Precision

HEADROOM = 2.0
"""Texts other than those of the probe have larger values; the rotary embedding alone takes sqrt(2)."""


_ATTENTION = {(f"{name}_proj", "output") for name in ("q", "k", "v", "qkv")} | {("o_proj", "input")}


@dataclass(frozen=True)
class OverflowRisk:
    """A value that ``HEADROOM`` times over would exceed the FP16 maximum.

    Attributes:
        tensor: its name, such as ``model.layers.3.mlp.down_proj output``.
        magnitude: the largest seen.
        step: where, 0 for the prompt.
        fix: what to export with, such as ``--keep-float32 NAME``.
    """

    tensor: str
    magnitude: float
    step: int
    fix: str

    def __str__(self) -> str:
        where = f"at step {self.step}" if self.step else "in the prompt"
        return sentence(
            self.tensor,
            f"reaches {self.magnitude:.4g} {where}",
            f"the FP16 maximum is {FP16_MAX:.0f}",
            f"Export with {self.fix}.",
        )


def fp16_variants(precisions: Sequence[Precision]) -> list[Precision]:
    """Return those whose products have results in FP16."""
    return [precision for precision in precisions if SPECS[precision].dtype == "float16"]


def overflow_risks(magnitudes: Magnitudes, *, keep_float32: Sequence[str], tied: bool) -> list[OverflowRisk]:
    """Return what is at risk in FP16, the largest first.

    Args:
        magnitudes: of ``largest_magnitudes``.
        keep_float32: parts of weight names that stay in FP32 already.
        tied: whether lm_head is the embedding table.
    """
    risks = []
    for tensor, maxima in magnitudes.items():
        module, kind = tensor.rsplit(" ", 1)
        step = int(np.argmax(maxima))
        if maxima[step] * HEADROOM > FP16_MAX and _is_low(module, kind, keep_float32, tied=tied):
            risks.append(OverflowRisk(tensor, float(maxima[step]), step, _fix(module, kind, tied=tied)))
    return sorted(risks, key=lambda risk: -risk.magnitude)


def write_magnitudes(path: Path, magnitudes: Magnitudes, *, texts: int) -> None:
    """Write the magnitudes as JSON: ``texts``, ``fp16_limit``, and ``tensors`` with one number for each step."""
    tensors = {name: [float(f"{value:.6g}") for value in maxima] for name, maxima in sorted(magnitudes.items())}
    content = {"texts": texts, "fp16_limit": FP16_MAX, "tensors": tensors}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _is_low(module: str, kind: str, keep_float32: Sequence[str], *, tied: bool) -> bool:
    """Whether the rules of ``mixed_precision.py`` put the value into FP16."""

    def kept(name: str) -> bool:
        weight = "model.embed_tokens.weight" if tied and name == "lm_head" else f"{name}.weight"
        return any(part in weight for part in keep_float32)

    block, _, projection = module.rpartition(".")
    if kind == "output":
        return not kept(module)
    if projection == "o_proj":  # comes out of Attention, which is always low
        return True
    if projection == "down_proj":  # the product of two others, which a low projection would round once more
        factors = kept(f"{block}.gate_up_proj") or (kept(f"{block}.gate_proj") and kept(f"{block}.up_proj"))
        return not (factors and kept(module))
    return not kept(module)


def _fix(module: str, kind: str, *, tied: bool) -> str:
    block, _, projection = module.rpartition(".")
    if (projection, kind) in _ATTENTION:
        return "--precision bf16: attention always runs in the type of the variant"
    if module == "lm_head":
        float32 = "embed_tokens" if tied else module
    elif projection in ("gate_proj", "up_proj", "gate_up_proj") or (projection, kind) == ("down_proj", "input"):
        float32 = block
    else:
        float32 = module
    return f"--keep-float32 {float32}, or with --precision bf16"
