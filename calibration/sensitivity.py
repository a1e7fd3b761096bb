"""Measures which inputs the ``int8`` variant has to exclude from quantization to preserve the embedding.

The measure is the rank correlation of all pairwise similarities with those of FP32, after K steps, on held-out texts.
If quantizing everything at once stays within the allowed drop, nothing is excluded. Otherwise every input is quantized
alone, and the most sensitive ones are excluded, as few as meet the drop.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gircse.calibration.calibration_file import Fidelity, InputCalibration, Sensitivity, SoftTokenCalibration
from gircse.calibration.int8.fake_quantization import quantized_inputs, soft_token_reweighting
from gircse.calibration.int8.gptq import RoundedWeight
from gircse.calibration.int8.scheme import QuantizedInput
from gircse.checkpoint.reference import Reweight, all_probabilities, refine
from gircse.reporting.progress import StageProgress
from gircse.reporting.similarity import neighbor_overlap, pairwise_rank_correlation
from gircse.runtime.manifest import Pooling
from gircse.runtime.numerics import Float32, l2_normalize
from gircse.runtime.tokenization import TokenBatch

SOFT_TOKEN = "soft-token embedding"
EVERYTHING = "everything"
"""Names of what was quantized, beside those of inputs, kinds and layers."""


@dataclass(frozen=True, kw_only=True)
class SensitivityStudy:
    """A model and texts, to embed with any set of inputs quantized.

    Attributes:
        model: the reference, in FP32.
        inputs: every quantized input.
        calibrations: of every input, by name.
        weights: of every projection, rounded, by name.
        soft_token: how INT8 variants make soft tokens; None for K = 0.
        batches: held-out texts.
        steps: K.
        pooling: of the vectors.
        temperature: divisor of the logits.
    """

    model: Any
    inputs: tuple[QuantizedInput, ...]
    calibrations: Mapping[str, InputCalibration]
    weights: Mapping[str, RoundedWeight]
    soft_token: SoftTokenCalibration | None
    batches: tuple[TokenBatch, ...]
    steps: int
    pooling: Pooling
    temperature: float

    def embed(self, *, reweight: Reweight = all_probabilities) -> Float32:
        """Return the vectors after K steps, (n, hidden) float32, of the model as it is now."""
        size = sum(len(batch.rows) for batch in self.batches)
        vectors = np.empty((size, self.model.config.hidden_size), np.float32)
        for batch in self.batches:
            ids, mask = (torch.from_numpy(a).to(self.model.device) for a in (batch.input_ids, batch.attention_mask))
            loop = refine(
                self.model,
                ids,
                mask,
                steps=self.steps,
                temperature=self.temperature,
                reweight=reweight,
            )
            states = [state.hidden for state in loop]
            pooled = torch.stack(states[1:]).mean(0) if self.pooling is Pooling.MEAN and self.steps else states[-1]
            vectors[list(batch.rows)] = l2_normalize(pooled.float().cpu().numpy())
        return vectors

    def embed_quantized(self, inputs: Collection[QuantizedInput], *, reweight: Reweight) -> Float32:
        """Return the vectors with some inputs quantized."""
        with quantized_inputs(self.model, inputs, self.calibrations, self.weights):
            return self.embed(reweight=reweight)


def measure_sensitivity(study: SensitivityStudy, *, max_drop: float, progress: StageProgress) -> Sensitivity:
    """Quantize everything, each kind and each layer, and choose what has to be excluded from quantization.

    Args:
        study: model, calibrations and texts.
        max_drop: largest allowed loss of rank correlation.
        progress: shows the stages.
    """
    exact = study.embed()
    approximately = soft_token_reweighting(study.soft_token)

    def fidelity(name: str, inputs: Collection[QuantizedInput], reweight: Reweight = approximately) -> Fidelity:
        vectors = study.embed_quantized(inputs, reweight=reweight)
        return Fidelity(name, pairwise_rank_correlation(vectors, exact), neighbor_overlap(vectors, exact))

    def alone(title: str, parts: Mapping[str, Collection[QuantizedInput]]) -> list[Fidelity]:
        found = []
        with progress.stage(title, total=len(parts)) as advance:
            for name, inputs in parts.items():
                found.append(fidelity(name, inputs, all_probabilities))
                advance(1)
        return found

    kinds = alone("quantize each kind of input", _grouped(study.inputs, lambda one: one.kind))
    layers = alone("quantize each layer", _grouped(study.inputs, _layer))
    with progress.stage("quantize everything"):
        if study.soft_token is not None:
            kinds.append(fidelity(SOFT_TOKEN, []))
        everything = fidelity(EVERYTHING, study.inputs)
    loss = 1 - everything.rank_correlation
    if loss <= max_drop:
        return Sensitivity((), everything, tuple(kinds), tuple(layers), ())
    progress.note(f"  everything quantized loses {loss:.2g} of rank correlation, --max-drop is {max_drop:g}")
    each = alone("quantize each input", _grouped(study.inputs, lambda one: one.name))
    correlations = {point.name: point.rank_correlation for point in each}
    ranked = sorted(study.inputs, key=lambda one: correlations[one.name])
    with progress.stage("search the fewest inputs to exclude"):
        count, curve = fewest_excluded(
            lambda count: fidelity(f"{count} excluded", ranked[count:]),
            len(ranked),
            everything=everything,
            max_drop=max_drop,
        )
    result = next((point for point in curve if point.name == f"{count} excluded"), everything)
    return Sensitivity(tuple(one.name for one in ranked[:count]), result, tuple(kinds), tuple(layers), curve)


def fewest_excluded(
    excluding: Callable[[int], Fidelity], total: int, *, everything: Fidelity, max_drop: float
) -> tuple[int, tuple[Fidelity, ...]]:
    """Find by bisection how many of the ranked inputs have to be excluded to stay within the drop.

    Args:
        excluding: measures the fidelity with that many excluded.
        total: number of inputs.
        everything: fidelity with none excluded, which is not enough.
        max_drop: largest allowed loss of rank correlation.

    Returns:
        The number, and the measured points of the trade-off curve, fewest excluded first.
    """
    measured = {0: everything}
    low, high = 0, total  # low is not enough; more than all of them cannot be excluded
    while high - low > 1:
        middle = (low + high) // 2
        measured[middle] = excluding(middle)
        if 1 - measured[middle].rank_correlation <= max_drop:
            high = middle
        else:
            low = middle
    if high not in measured:
        measured[high] = excluding(high)
    return high, tuple(measured[count] for count in sorted(measured))


def _grouped(inputs: Sequence[QuantizedInput], key: Callable[[QuantizedInput], str]) -> dict[str, list[QuantizedInput]]:
    groups: dict[str, list[QuantizedInput]] = {}
    for quantized_input in inputs:
        groups.setdefault(key(quantized_input), []).append(quantized_input)
    return groups


def _layer(quantized_input: QuantizedInput) -> str:
    return quantized_input.name.rpartition(".")[0] or quantized_input.name
