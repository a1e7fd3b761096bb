"""Which inputs the ``int8`` variant cannot quantize without losing the embedding: found by measurement, one at a time.

The measure is the rank correlation of all pairs' similarities with those of FP32, after K steps, on texts that were
not calibrated on. If everything quantized at once stays within the allowed drop, nothing is kept in float. Otherwise
every input is quantized alone, and the most sensitive ones are kept, as few as meet the drop.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gircse.calibration.calibration_file import Fidelity, InputCalibration, Sensitivity, SoftTokenCalibration
from gircse.calibration.int8.fake_quantization import mixture_of, quantized_inputs
from gircse.calibration.int8.gptq import RoundedWeight
from gircse.calibration.int8.scheme import QuantizedInput
from gircse.checkpoint.reference import Mixture, refine
from gircse.reporting.progress import StageProgress
from gircse.reporting.similarity import neighbor_overlap, pairwise_rank_correlation
from gircse.runtime.manifest import Pooling
from gircse.runtime.numerics import Float32, l2_normalize
from gircse.runtime.tokenization import TokenBatch

MIXING = "soft-token mixing"
EVERYTHING = "everything"


@dataclass(frozen=True)
class SensitivityStudy:
    """What stays the same while inputs are quantized.

    Attributes:
        model: the reference, in FP32.
        sites: every input.
        calibrations: of every input.
        weights: of every projection, rounded.
        mixture: of the INT8 variants.
        batches: texts to evaluate_gates on.
        steps: K.
        pooling: of the vectors.
        temperature: divisor of the logits.
    """

    model: Any
    sites: tuple[QuantizedInput, ...]
    calibrations: Mapping[str, InputCalibration]
    weights: Mapping[str, RoundedWeight]
    mixture: SoftTokenCalibration | None
    batches: tuple[TokenBatch, ...]
    steps: int
    pooling: Pooling
    temperature: float

    def embed(self, *, mixture: Mixture = torch.matmul) -> Float32:
        """Return the vectors after K steps, (n, hidden) float32, of the model as it is now."""
        size = sum(len(batch.rows) for batch in self.batches)
        vectors = np.empty((size, self.model.config.hidden_size), np.float32)
        for batch in self.batches:
            ids, mask = (torch.from_numpy(a).to(self.model.device) for a in (batch.input_ids, batch.attention_mask))
            states = [
                state.hidden
                for state in refine(
                    self.model, ids, mask, steps=self.steps, temperature=self.temperature, mixture=mixture
                )
            ]
            pooled = torch.stack(states[1:]).mean(0) if self.pooling is Pooling.MEAN and self.steps else states[-1]
            vectors[list(batch.rows)] = l2_normalize(pooled.float().cpu().numpy())
        return vectors

    def embed_quantized(self, sites: Collection[QuantizedInput], *, mixture: Mixture) -> Float32:
        """Return the vectors with some inputs quantized."""
        with quantized_inputs(self.model, sites, self.calibrations, self.weights):
            return self.embed(mixture=mixture)


def measure_sensitivity(study: SensitivityStudy, *, max_drop: float, progress: StageProgress) -> Sensitivity:
    """Quantize everything, each kind and each layer, and choose what has to stay in float.

    Args:
        study: model, calibrations and texts.
        max_drop: largest loss of rank correlation.
        progress: where to show the stages.
    """
    exact = study.embed()
    exactly, approximately = torch.matmul, mixture_of(study.mixture)

    def fidelity(name: str, sites: Collection[QuantizedInput], mixture: Mixture) -> Fidelity:
        vectors = study.embed_quantized(sites, mixture=mixture)
        return Fidelity(name, pairwise_rank_correlation(vectors, exact), neighbor_overlap(vectors, exact))

    def alone(title: str, parts: Mapping[str, Collection[QuantizedInput]]) -> list[Fidelity]:
        found = []
        with progress.stage(title, total=len(parts)) as advance:
            for name, sites in parts.items():
                found.append(fidelity(name, sites, exactly))
                advance(1)
        return found

    kinds = alone("quantize each kind of input", _grouped(study.sites, lambda site: site.kind))
    layers = alone("quantize each layer", _grouped(study.sites, _layer))
    with progress.stage("quantize everything"):
        if study.mixture is not None:
            kinds.append(fidelity(MIXING, [], approximately))
        everything = fidelity(EVERYTHING, study.sites, approximately)
    loss = 1 - everything.rank_correlation
    if loss <= max_drop:
        return Sensitivity((), everything, tuple(kinds), tuple(layers), ())
    progress.note(f"  everything quantized loses {loss:.2g} of rank correlation, --max-drop is {max_drop:g}")
    inputs = alone("quantize each input", _grouped(study.sites, lambda site: site.name))
    correlations = {point.name: point.rank_correlation for point in inputs}
    ranked = sorted(study.sites, key=lambda site: correlations[site.name])
    with progress.stage("search the fewest inputs to keep in float"):
        count, curve = fewest_excluded(
            lambda count: fidelity(f"{count} kept", ranked[count:], approximately),
            len(ranked),
            everything=everything,
            max_drop=max_drop,
        )
    result = next((point for point in curve if point.name == f"{count} kept"), everything)
    return Sensitivity(tuple(site.name for site in ranked[:count]), result, tuple(kinds), tuple(layers), curve)


def fewest_excluded(
    keeping: Callable[[int], Fidelity], total: int, *, everything: Fidelity, max_drop: float
) -> tuple[int, tuple[Fidelity, ...]]:
    """Find by bisection how many of the ranked inputs have to be kept for the drop to be allowed.

    Args:
        keeping: measures the fidelity with that many kept.
        total: number of inputs.
        everything: fidelity with none kept, which is not enough.
        max_drop: largest loss of rank correlation.

    Returns:
        The number, and the measured points of the trade-off curve, fewest kept first.
    """
    measured = {0: everything}
    low, high = 0, total  # low does not suffice; more than all of them cannot be kept
    while high - low > 1:
        middle = (low + high) // 2
        measured[middle] = keeping(middle)
        if 1 - measured[middle].rank_correlation <= max_drop:
            high = middle
        else:
            low = middle
    if high not in measured:
        measured[high] = keeping(high)
    return high, tuple(measured[count] for count in sorted(measured))


def _grouped(sites: Sequence[QuantizedInput], key: Callable[[QuantizedInput], str]) -> dict[str, list[QuantizedInput]]:
    groups: dict[str, list[QuantizedInput]] = {}
    for site in sites:
        groups.setdefault(key(site), []).append(site)
    return groups


def _layer(site: QuantizedInput) -> str:
    return site.name.rpartition(".")[0] or site.name
