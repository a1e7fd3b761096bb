"""E4M3, the 8-bit floating-point numbers of ``fp8``: one sign, four exponent and three mantissa bits, up to 448.

The error of a rounding is at most 1/16 of the number, whatever its size, down to 2^-6; below it is at most 2^-10. So a
scale does not have to fit the magnitudes closely, as that of integers has to, and two things are free:

    scale = max(magnitude / 448, 2^-14), rounded up to FP16

FP16 holds every such scale exactly, with which TensorRT reads the number back, and none is subnormal there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gircse.calibration.int8.rounding import WeightGrid
from gircse.export.graph.mixed_precision import FP16_MAX
from gircse.runtime.errors import ExportError

E4M3_MAX = 448.0
"""Largest number. What is larger becomes this, in ONNX Runtime (``saturate``) and in TensorRT, which clips first."""

E4M3_LO_LIMB = 16.0
"""What the lo limb is multiplied with: the rounding error of a number up to 448 is at most 16."""

E4M3_LIMBS = 2
"""Limbs of every activation: with one, the demo loses three times as much rank correlation."""

MIN_SCALE = 2.0**-14
"""Smallest normal FP16 number."""


@dataclass(frozen=True)
class E4m3Grid(WeightGrid):
    """The E4M3 numbers, times a scale that FP16 holds exactly."""

    @property
    def largest(self) -> float:
        """The largest number."""
        return E4M3_MAX

    @property
    def dtype(self) -> torch.dtype:
        """What holds the numbers."""
        return torch.float8_e4m3fn

    def round(self, levels: Tensor) -> Tensor:
        """Round to the nearest number, in place; larger ones become the largest, and not NaN."""
        levels.clamp_(-self.largest, self.largest)
        return levels.copy_(levels.to(self.dtype))

    def scales(self, magnitudes: Tensor) -> Tensor:
        """Return the scales, float32, with which the grid holds numbers up to some magnitudes."""
        exact = (magnitudes / self.largest).clamp(min=MIN_SCALE)
        nearest = exact.half()
        above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
        return torch.where(nearest.float() < exact, above, nearest).float()


E4M3_GRID = E4m3Grid()


def e4m3_step(threshold: float, name: str) -> float:
    """Return the scale of an activation whose magnitude is at most ``threshold``; 0 for one that is always 0.

    Raises:
        ExportError: FP16 cannot hold the activation.
    """
    step = float(E4M3_GRID.scales(torch.tensor(threshold)))
    check_fp16(step * E4M3_MAX, name)
    return step


def check_fp16(magnitude: float, name: str) -> None:
    """Refuse what FP16, in which an operand is read back, cannot hold.

    Raises:
        ExportError: it cannot; ``name`` says what is so large.
    """
    if magnitude > FP16_MAX:
        raise ExportError(
            name,
            f"has a magnitude of {magnitude:.6g}",
            f"the FP16 maximum is {FP16_MAX:.0f}",
            "Leave its product in float: --keep-float32 NAME, with a part of its weight's name.",
        )
