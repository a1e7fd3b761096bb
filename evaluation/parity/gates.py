"""The limits that a candidate has to keep, by precision, and the verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec


@dataclass(frozen=True)
class GateLimits:
    """What a candidate has to keep.

    Attributes:
        min_cosine: smallest cosine of a text's vector to the reference's, over every text and step.
        min_rank_correlation: smallest Spearman correlation of pairwise similarities, over every step.
        min_overlap: smallest mean share of common ten nearest neighbors, over every step.
        max_task_drop: largest loss of score on a task, with all K steps.
        max_batch_difference: largest difference of an element between a text alone and in a batch.
    """

    min_cosine: float
    min_rank_correlation: float
    min_overlap: float
    max_task_drop: float
    max_batch_difference: float


FP32 = GateLimits(0.9999, 0.9999, 0.99, 0.001, 1e-3)
_HALF = GateLimits(0.9995, 0.999, 0.98, 0.002, 5e-3)
DEFAULT_LIMITS = {
    "fp32": FP32,
    "fp16": _HALF,
    "bf16": _HALF,
    "int8": GateLimits(0.98, 0.99, 0.93, 0.004, 5e-2),
    "int8-weights": GateLimits(0.995, 0.9995, 0.98, 0.002, 1e-3),
}
"""Limits of each precision; one that is not listed has to keep those of FP32.

Batch difference of int8: another batch shape changes the last bit of FP32 sums, which flips roundings to 8 bits. Demo:
0.017 to 0.026; a scale taken over the batch (ONNX Runtime's ``quantize_dynamic``) has 0.127."""


class GateResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One gate: ``value`` has to be at least (``>=``) or at most (``<=``) ``limit``."""

    name: str
    value: float
    comparison: str
    limit: float
    passed: bool


def limits_of(precision: str, overrides: Mapping[str, float]) -> GateLimits:
    """Return the limits that hold for a precision; ``overrides`` replaces defaults by the name of the field."""
    return replace(DEFAULT_LIMITS.get(precision, FP32), **overrides)


def at_least(name: str, value: float, limit: float) -> GateResult:
    """Judge a value that must not be smaller than its limit; NaN fails."""
    return GateResult(name, value, ">=", limit, bool(value >= limit))


def at_most(name: str, value: float, limit: float) -> GateResult:
    """Judge a value that must not be larger than its limit; NaN fails."""
    return GateResult(name, value, "<=", limit, bool(value <= limit))


def all_passed(gates: Sequence[GateResult]) -> bool:
    """Whether every gate has passed."""
    return all(gate.passed for gate in gates)
