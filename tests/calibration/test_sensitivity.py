"""As few inputs as possible are excluded: those that cost most."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from gircse.calibration.calibration_file import Fidelity
from gircse.calibration.int8.scheme import QuantizedInput, decoder_inputs
from gircse.calibration.sensitivity import fewest_excluded, measure_sensitivity
from gircse.reporting.progress import StageProgress


@dataclass(frozen=True)
class OneBadInput:
    """A study in which quantizing one input destroys the vectors and quantizing the others changes nothing."""

    bad: QuantizedInput
    inputs: tuple[QuantizedInput, ...] = decoder_inputs(2)
    soft_token: None = None

    def embed(self) -> np.ndarray:
        return np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)

    def embed_quantized(self, inputs: Collection[QuantizedInput], *, reweight: Any) -> np.ndarray:
        seed = 1 if self.bad in inputs else 0
        return np.random.default_rng(seed).normal(size=(12, 8)).astype(np.float32)


@pytest.mark.parametrize("index", [0, 5, 8])
def test_the_most_sensitive_input_is_excluded_and_no_other(index: int) -> None:
    study: Any = OneBadInput(decoder_inputs(2)[index])
    found = measure_sensitivity(study, max_drop=0.01, progress=StageProgress())
    assert found.excluded == (study.bad.name,)
    assert found.result.rank_correlation == pytest.approx(1)
    assert found.curve[0].rank_correlation < 0.9


@pytest.mark.parametrize("needed", range(1, 8))
def test_bisection_finds_the_fewest(needed: int) -> None:
    def excluding(count: int) -> Fidelity:
        return Fidelity(f"{count} excluded", 1.0 if count >= needed else 0.5, 1.0)

    count, curve = fewest_excluded(excluding, 7, everything=Fidelity("everything", 0.5, 1.0), max_drop=0.01)
    assert count == needed
    assert f"{needed} excluded" in [point.name for point in curve]
    assert [point.rank_correlation for point in curve] == sorted(point.rank_correlation for point in curve)
