"""The limits that a candidate has to keep, which depend on its precision, and the verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from gircse.runtime.precision import ParityLimits, precision_spec


class GateResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One gate: ``value`` has to be at least (``>=``) or at most (``<=``) ``limit``."""

    name: str
    value: float
    comparison: str
    limit: float
    passed: bool


def limits_of(precision: str, overrides: Mapping[str, float]) -> ParityLimits:
    """Return the limits that hold for a precision; ``overrides`` replaces defaults by the name of the field."""
    return replace(precision_spec(precision).limits, **overrides)


def at_least(name: str, value: float, limit: float) -> GateResult:
    """Return the gate of a value that must not be smaller than its limit; NaN fails."""
    return GateResult(name, value, ">=", limit, bool(value >= limit))


def at_most(name: str, value: float, limit: float) -> GateResult:
    """Return the gate of a value that must not be larger than its limit; NaN fails."""
    return GateResult(name, value, "<=", limit, bool(value <= limit))


def all_passed(gates: Sequence[GateResult]) -> bool:
    """Whether every gate has passed."""
    return all(gate.passed for gate in gates)
