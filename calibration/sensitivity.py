"""Measures which inputs the ``int8`` variant has to exclude from quantization to preserve the embedding.

The measure is the rank correlation of all pairwise similarities with those of FP32, after K steps, on held-out texts.
If quantizing everything at once stays within the allowed drop, nothing is excluded. Otherwise inputs are ranked and the
first ones are excluded, as few as meet the drop. In the mode ``full`` the rank is the loss with an input quantized
alone, which takes a run of the model for each; in ``kinds`` it is the error of the input's product, which is known.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gircse.calibration.calibration_file import (
    Fidelity,
    InputCalibration,
    Sensitivity,
    SensitivityMode,
    SoftTokenCalibration,
)
from gircse.calibration.int8.fake_quantization import RoundedWeights, quantized
from gircse.calibration.int8.scheme import QuantizedInput
from gircse.calibration.resume import ResumeFolder
from gircse.checkpoint.reference import Advance, Reference
from gircse.reporting.progress import StageProgress
from gircse.reporting.similarity import neighbor_overlap, pairwise_rank_correlation
from gircse.runtime.batch_planner import TokenBatch
from gircse.runtime.manifest import Pooling
from gircse.runtime.numerics import Float32, l2_normalize

SOFT_TOKEN = "soft-token embedding"
EVERYTHING = "everything"
"""Names of what was quantized, beside those of inputs, kinds and layers."""

UNLIMITED = 1 << 30


class Part(NamedTuple):
    """What is quantized in one run.

    Attributes:
        name: for the record.
        inputs: the quantized inputs.
        soft_token: whether soft tokens are made as in the variant.
    """

    name: str
    inputs: Collection[QuantizedInput]
    soft_token: bool


EXACT_PART = Part("exact", (), soft_token=False)


@dataclass(frozen=True, kw_only=True)
class SensitivityStudy:
    """A model and texts, to embed with any set of inputs quantized.

    Attributes:
        open_reference: opens the PyTorch model, when it is needed.
        inputs: every quantized input.
        calibrations: of every input, by name.
        weights: of every projection, rounded, by name.
        soft_token: how INT8 variants make soft tokens; None for K = 0.
        batches: held-out texts.
        steps: K.
        pooling: of the vectors.
        temperature: divisor of the logits.
        folder: keeps the vectors of each part, so that an interrupted measurement goes on.
    """

    open_reference: Callable[[], Reference]
    inputs: tuple[QuantizedInput, ...]
    calibrations: Mapping[str, InputCalibration]
    weights: RoundedWeights
    soft_token: SoftTokenCalibration | None
    batches: tuple[TokenBatch, ...]
    steps: int
    pooling: Pooling
    temperature: float
    folder: ResumeFolder

    @functools.cached_property
    def reference(self) -> Reference:
        """The PyTorch model."""
        return self.open_reference()

    @property
    def texts(self) -> int:
        """Number of texts."""
        return sum(len(batch.rows) for batch in self.batches)

    def embed(self, parts: Sequence[Part], advance: Advance = lambda _: None) -> list[Float32]:
        """Return the vectors after K steps, (n, hidden) float32, with each of the parts quantized.

        Args:
            parts: what to quantize; those that the folder has are not run again.
            advance: told amounts that add up to the number of texts, times the parts.
        """
        left = [part for part in parts if self.folder.facts(_saved(part)) is None]
        advance(self.texts * (len(parts) - len(left)))
        if left:
            self._run(left, advance)
        return [l2_normalize(self.folder.tensor(_saved(part), "pooled").numpy()) for part in parts]

    def _run(self, parts: Sequence[Part], advance: Advance) -> None:
        variations = [
            quantized(part.inputs, self.calibrations, self.weights, self.soft_token if part.soft_token else None)
            for part in parts
        ]
        pooled = torch.zeros(len(parts), self.texts, self.reference.model.config.hidden_size)
        batches_left = [len(self.batches)] * len(parts)
        states = self.reference.refine(
            self.batches, steps=self.steps, temperature=self.temperature, variations=variations, advance=advance
        )
        for state in states:
            # The sum over the steps has the direction of their mean.
            if state.step == self.steps or (state.step and self.pooling is Pooling.MEAN):
                pooled[state.variation, list(self.batches[state.batch].rows)] += state.hidden.float().cpu()
            if state.step == self.steps:
                batches_left[state.variation] -= 1
                if not batches_left[state.variation]:
                    self.folder.save(_saved(parts[state.variation]), {"pooled": pooled[state.variation]})


def measure_sensitivity(
    study: SensitivityStudy,
    mode: SensitivityMode,
    *,
    max_drop: float,
    progress: StageProgress,
    evaluations: int = UNLIMITED,
) -> Sensitivity:
    """Quantize everything, each kind and each layer, and choose what has to be excluded from quantization.

    Args:
        study: model, calibrations and texts.
        mode: what is measured.
        max_drop: largest allowed loss of rank correlation.
        progress: shows the stages.
        evaluations: most runs of the search for what to exclude.
    """
    if mode is SensitivityMode.OFF:
        return Sensitivity((), None, (), (), (), mode)
    kinds = _grouped(study.inputs, lambda one: one.kind)
    layers = _grouped(study.inputs, _layer) if mode is SensitivityMode.FULL else []
    soft_token = [Part(SOFT_TOKEN, (), soft_token=True)] if study.soft_token is not None else []
    exact: Float32

    def fidelities(title: str, parts: Sequence[Part]) -> list[Fidelity]:
        with progress.stage(title, total=study.texts * len(parts)) as advance:
            return [
                _fidelity(part.name, vectors, exact)
                for part, vectors in zip(parts, study.embed(parts, advance), strict=True)
            ]

    parts = [EXACT_PART, Part(EVERYTHING, study.inputs, soft_token=True), *kinds, *soft_token, *layers]
    with progress.stage(f"quantize {_titles(mode)}", total=study.texts * len(parts)) as advance:
        exact, *vectors = study.embed(parts, advance)
    everything, *alone = (_fidelity(part.name, found, exact) for part, found in zip(parts[1:], vectors, strict=True))
    measured = len(kinds) + len(soft_token)
    by_kind, by_layer = tuple(alone[:measured]), tuple(alone[measured:])
    loss = 1 - everything.rank_correlation
    if loss <= max_drop:
        return Sensitivity((), everything, by_kind, by_layer, (), mode)
    progress.note(f"  everything quantized loses {loss:.2g} of rank correlation, --max-drop is {max_drop:g}")
    costs = {one.name: study.calibrations[one.name].error for one in study.inputs}
    if mode is SensitivityMode.FULL:
        each = fidelities("quantize each input", _grouped(study.inputs, lambda one: one.name))
        costs = {point.name: -point.rank_correlation for point in each}
    ranked = sorted(study.inputs, key=lambda one: -costs[one.name])
    count, curve = fewest_excluded(
        lambda count: fidelities(
            f"exclude {count} of {len(ranked)} inputs", [Part(f"{count} excluded", ranked[count:], soft_token=True)]
        )[0],
        len(ranked),
        everything=everything,
        max_drop=max_drop,
        evaluations=evaluations,
    )
    result = next(point for point in curve if point.name == (f"{count} excluded" if count else EVERYTHING))
    return Sensitivity(tuple(one.name for one in ranked[:count]), result, by_kind, by_layer, curve, mode)


def fewest_excluded(
    excluding: Callable[[int], Fidelity],
    total: int,
    *,
    everything: Fidelity,
    max_drop: float,
    evaluations: int = UNLIMITED,
) -> tuple[int, tuple[Fidelity, ...]]:
    """Find how many of the ranked inputs have to be excluded to stay within the drop.

    The interval is halved on a logarithmic scale, because a few inputs are usually enough.

    Args:
        excluding: measures the fidelity with that many excluded.
        total: number of inputs.
        everything: fidelity with none excluded, which is not enough.
        max_drop: largest allowed loss of rank correlation.
        evaluations: most calls of ``excluding``, at least 1.

    Returns:
        The number, and the measured points of the trade-off curve, fewest excluded first. If no measured number meets
        the drop, it is the one with the best fidelity.
    """
    measured = {0: everything}
    low, high = 0, total  # low is not enough; more than all of them cannot be excluded
    while high - low > 1 and len(measured) <= evaluations:
        middle = min(max(math.isqrt((low + 1) * high), low + 1), high - 1)
        measured[middle] = excluding(middle)
        if 1 - measured[middle].rank_correlation <= max_drop:
            high = middle
        else:
            low = middle
    if high not in measured and len(measured) <= evaluations:
        measured[high] = excluding(high)
    if high not in measured:
        high = max(measured, key=lambda count: measured[count].rank_correlation)
    return high, tuple(measured[count] for count in sorted(measured))


def parts_to_measure(inputs: Sequence[QuantizedInput], mode: SensitivityMode) -> int:
    """Return how many runs a mode takes if everything quantized stays within the drop, the exact one included."""
    if mode is SensitivityMode.OFF:
        return 0
    layers = _grouped(inputs, _layer) if mode is SensitivityMode.FULL else []
    return 3 + len(_grouped(inputs, lambda one: one.kind)) + len(layers)


def _saved(part: Part) -> str:
    return f"sensitivity of {part.name}"


def _fidelity(name: str, vectors: Float32, exact: Float32) -> Fidelity:
    return Fidelity(name, pairwise_rank_correlation(vectors, exact), neighbor_overlap(vectors, exact))


def _titles(mode: SensitivityMode) -> str:
    layers = ", each layer" if mode is SensitivityMode.FULL else ""
    return f"everything, each kind of input{layers}"


def _grouped(inputs: Sequence[QuantizedInput], key: Callable[[QuantizedInput], str]) -> list[Part]:
    groups: dict[str, list[QuantizedInput]] = {}
    for quantized_input in inputs:
        groups.setdefault(key(quantized_input), []).append(quantized_input)
    return [Part(name, members, soft_token=False) for name, members in groups.items()]


def _layer(quantized_input: QuantizedInput) -> str:
    return quantized_input.name.rpartition(".")[0] or quantized_input.name
