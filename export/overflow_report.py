"""Judge measured magnitudes: which values of a FP16 graph come too near the end of its range, and what cures it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gircse.export.overflow_probe import Magnitudes

FP16_LIMIT = 65504.0
HEADROOM = 2.0
"""Other texts than those of the probe have larger values; sqrt(2) alone goes to the rotary embedding."""


@dataclass(frozen=True)
class OverflowRisk:
    """A value with less than ``HEADROOM`` below the FP16 limit.

    Attributes:
        tensor: its name, such as ``model.layers.3.mlp.down_proj output``.
        magnitude: the largest seen.
        step: where, 0 for the prompt.
        cure: what to add to the export.
    """

    tensor: str
    magnitude: float
    step: int
    cure: str

    def __str__(self) -> str:
        where = f"at step {self.step}" if self.step else "in the prompt"
        return (
            f"{self.tensor}: {self.magnitude:.4g} {where}, {FP16_LIMIT / self.magnitude:.1f} times below the end of FP16 | "
            f"{HEADROOM:.0f} times | {self.cure}"
        )


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
        if maxima[step] * HEADROOM > FP16_LIMIT and _is_low(module, kind, keep_float32, tied=tied):
            risks.append(OverflowRisk(tensor, float(maxima[step]), step, _cure(module, kind, tied=tied)))
    return sorted(risks, key=lambda risk: -risk.magnitude)


def write_magnitudes(path: Path, magnitudes: Magnitudes, *, texts: int) -> None:
    """Write the magnitudes as JSON: ``texts``, ``fp16_limit``, and ``tensors`` with one number for each step."""
    tensors = {name: [float(f"{value:.6g}") for value in maxima] for name, maxima in sorted(magnitudes.items())}
    content = {"texts": texts, "fp16_limit": FP16_LIMIT, "tensors": tensors}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _is_low(module: str, kind: str, keep_float32: Sequence[str], *, tied: bool) -> bool:
    """Whether the rules of ``precision.py`` put the value into FP16."""

    def kept(name: str) -> bool:
        weight = "model.embed_tokens.weight" if tied and name == "lm_head" else f"{name}.weight"
        return any(part in weight for part in keep_float32)

    block, _, projection = module.rpartition(".")
    if kind == "output":
        return not kept(module)
    if projection == "o_proj":  # comes out of Attention, which is always low
        return True
    if projection == "down_proj":  # the product of two others
        return not (kept(f"{block}.gate_proj") and kept(f"{block}.up_proj"))
    return not kept(module)


def _cure(module: str, kind: str, *, tied: bool) -> str:
    block, _, projection = module.rpartition(".")
    if (projection, kind) in {("q_proj", "output"), ("k_proj", "output"), ("v_proj", "output"), ("o_proj", "input")}:
        return "--precision bf16, for attention runs in the low type"
    if module == "lm_head":
        island = "embed_tokens" if tied else module
    elif projection in ("gate_proj", "up_proj") or (projection, kind) == ("down_proj", "input"):
        island = block
    else:
        island = module
    return f"--keep-float32 {island}, or --precision bf16"
