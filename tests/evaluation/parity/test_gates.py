"""Gates fail on NaN, and limits are those of the precision unless they are replaced."""

import pytest

from gircse.evaluation.parity.gates import at_least, at_most, limits_of
from gircse.runtime import BundleError
from gircse.runtime.precision import SPECS, Precision


def test_limits() -> None:
    assert at_least("x", 0.5, 0.5).passed
    assert not at_least("x", float("nan"), 0.5).passed
    assert not at_most("x", float("nan"), 0.5).passed
    assert limits_of("fp16", {}) == SPECS[Precision.FP16].limits
    with pytest.raises(BundleError, match="unheard-of"):
        limits_of("unheard-of", {})
    changed = limits_of("int8", {"min_overlap": 0.5, "max_task_drop": 0.0})
    assert (changed.min_overlap, changed.max_task_drop) == (0.5, 0.0)
    assert changed.min_cosine == SPECS[Precision.INT8].limits.min_cosine
