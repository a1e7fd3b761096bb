"""As few inputs as possible are excluded: those that cost most."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from gircse.calibration.calibration_file import Fidelity, InputCalibration, Sensitivity, SensitivityMode
from gircse.calibration.int8.scheme import VOCABULARY_INPUT, InputKind, QuantizedInput, decoder_inputs
from gircse.calibration.sensitivity import Part, fewest_excluded, measure_sensitivity, parts_to_measure
from gircse.reporting.progress import StageProgress


@dataclass(frozen=True)
class OneBadInput:
    """A study in which quantizing one input destroys the vectors and quantizing the others changes nothing."""

    bad: QuantizedInput
    inputs: tuple[QuantizedInput, ...] = decoder_inputs(2)
    soft_token: None = None

    texts: int = 12
    embedded: list[str] = field(default_factory=list)

    @property
    def calibrations(self) -> dict[str, InputCalibration]:
        """Errors grow with the number of the input."""
        return {
            one.name: InputCalibration(None, (), (), (1.0,), (1.0,), error=number / 100)
            for number, one in enumerate(self.inputs)
        }

    def embed(self, parts: Sequence[Part], advance: Any) -> list[np.ndarray]:
        self.embedded.extend(part.name for part in parts)
        seeds = [1 if self.bad in part.inputs else 0 for part in parts]
        return [np.random.default_rng(seed).normal(size=(self.texts, 8)).astype(np.float32) for seed in seeds]


@pytest.mark.parametrize("index", [0, 5, 8])
def test_the_most_sensitive_input_is_excluded_and_no_other(index: int) -> None:
    study: Any = OneBadInput(decoder_inputs(2)[index])
    found = measure_sensitivity(study, SensitivityMode.FULL, max_drop=0.01, progress=StageProgress())
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


@pytest.mark.parametrize("needed", [1, 5, 60, 113])
def test_a_limited_search_measures_no_more_and_takes_the_best_it_found(needed: int) -> None:
    calls: list[int] = []

    def excluding(count: int) -> Fidelity:
        calls.append(count)
        return Fidelity(f"{count} excluded", 0.5 + 0.4 * count / 113 if count < needed else 1.0, 1.0)

    everything = Fidelity("everything", 0.5, 1.0)
    count, curve = fewest_excluded(excluding, 113, everything=everything, max_drop=0.01, evaluations=3)
    assert len(calls) <= 3
    assert len(curve) == len(calls) + 1
    enough = [found for found in calls if found >= needed]
    assert count == (min(enough) if enough else max(calls))


def test_kinds_rank_inputs_by_the_error_of_their_product() -> None:
    """The last input has the largest error, so it is the first to go, and the only one that has to."""
    study = OneBadInput(decoder_inputs(2)[8])
    progress: Any = StageProgress()
    found = measure_sensitivity(study, SensitivityMode.KINDS, max_drop=0.01, progress=progress)  # type: ignore[arg-type]
    assert (found.excluded, found.layers, found.mode) == (("lm_head",), (), "kinds")
    assert [point.name for point in found.kinds] == list(InputKind)
    assert not [name for name in study.embedded if name.startswith("model.layers")], "no input or layer alone"


@pytest.mark.parametrize("mode", [SensitivityMode.KINDS, SensitivityMode.FULL])
def test_runs_are_counted_before_they_are_made(mode: SensitivityMode) -> None:
    study: Any = OneBadInput(VOCABULARY_INPUT)
    measure_sensitivity(study, mode, max_drop=2.0, progress=StageProgress())
    assert parts_to_measure(study.inputs, mode) == len(study.embedded) + 1  # this study has no soft token


def test_off_measures_nothing() -> None:
    study: Any = OneBadInput(VOCABULARY_INPUT)
    found = measure_sensitivity(study, SensitivityMode.OFF, max_drop=0.0, progress=StageProgress())
    assert found == Sensitivity((), None, (), (), (), SensitivityMode.OFF)
    assert study.embedded == []
    assert parts_to_measure(study.inputs, SensitivityMode.OFF) == 0
