"""What a calibration has time for: the mode of the sensitivity, decided by what each would take on this machine."""

import msgspec

from gircse.calibration.calibration_file import SensitivityMode
from gircse.calibration.corpus import Corpus
from gircse.calibration.estimate import CalibrationTime
from gircse.calibration.int8.scheme import decoder_inputs
from gircse.calibration.int8.thresholds import Method
from gircse.calibration.sensitivity import UNLIMITED, parts_to_measure
from gircse.checkpoint.reference import Reference
from gircse.checkpoint.streamed_model import StreamedModel
from gircse.checkpoint.streamed_reference import StreamedReference
from gircse.checkpoint.streaming_time import StreamingRates

FULL_SECONDS = 20 * 60.0
"""Where the full sensitivity is estimated to take no longer, it is measured unless told otherwise; else that of kinds.
It is also what the search for inputs to exclude may take in the latter."""

MIN_EVALUATIONS = 3
"""Runs of that search where even one takes long."""


class Plan(msgspec.Struct, frozen=True):
    """What was decided; a resumed run keeps to it.

    Attributes:
        sensitivity: what it is measured on.
        evaluations: most runs of the search for inputs to exclude.
    """

    sensitivity: SensitivityMode
    evaluations: int


def make_plan(
    reference: Reference,
    streamed: StreamedModel,
    corpus: Corpus,
    *,
    steps: int,
    method: Method,
    smooth: float | None,
    sensitivity: SensitivityMode | None,
) -> tuple[Plan, str]:
    """Estimate how long a calibration will take, and decide what there is time for.

    Args:
        reference: makes the soft tokens and measures the sensitivity.
        streamed: runs the sweep over the layers.
        corpus: the texts.
        steps: K.
        method: how thresholds are chosen.
        smooth: migration strength of every input, or None to search one for each.
        sensitivity: the wanted mode, or None to choose one.

    Returns:
        The plan, and a line for the user with the estimate.
    """
    if isinstance(reference, StreamedReference):
        rates = reference.rates  # once: what was read is cached, and read faster the second time
    else:
        rates = StreamingRates.measure(streamed)
    time = CalibrationTime(reference, streamed, rates, steps=steps)
    inputs = decoder_inputs(streamed.num_layers)
    seconds = {SensitivityMode.OFF: 0.0}
    for one, models in ((SensitivityMode.KINDS, 2), (SensitivityMode.FULL, 3)):
        seconds[one] = time.sensitivity(corpus.held_out, parts=parts_to_measure(inputs, one), models=models)
    is_quick = seconds[SensitivityMode.FULL] <= FULL_SECONDS
    mode = sensitivity or (SensitivityMode.FULL if is_quick else SensitivityMode.KINDS)
    evaluations = UNLIMITED
    if mode is SensitivityMode.KINDS:
        one_run = time.sensitivity(corpus.held_out, parts=1, models=1)
        evaluations = max(MIN_EVALUATIONS, int(FULL_SECONDS / one_run))
    parts = {
        "soft tokens": time.soft_tokens(corpus.observed),
        "layers": time.layers(corpus.observed, method=method, smooth=smooth, rounds=mode is not SensitivityMode.OFF),
        f"sensitivity {mode}": seconds[mode],
    }
    split = ", ".join(f"{name} {_minutes(found)}" for name, found in parts.items())
    estimate = f"estimated: {_minutes(sum(parts.values()))} min on this machine as it is now ({split})"
    return Plan(mode, evaluations), estimate


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}" if seconds < 600 else f"{seconds / 60:.0f}"
