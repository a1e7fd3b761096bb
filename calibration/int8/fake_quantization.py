"""Emulates the ``int8`` variant in the PyTorch reference: every quantized value is rounded to its integers and back.

The sensitivity is measured with it, because it quantizes one input or layer at a time without an export. Integer
products are exact, so it differs from the exported graph only by the order of float sums (a test compares the two).
Where the vocabulary projection shares the embedding table, and the whole model is in memory, both are rounded, as in
the variant; a streamed reference keeps the table for the soft tokens exact.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gircse.calibration.calibration_file import InputCalibration, SoftTokenCalibration
from gircse.calibration.int8.gptq import Moments, RoundedWeight, round_smoothed
from gircse.calibration.int8.rounding import quantize_rows
from gircse.calibration.int8.scheme import HIGH_ENTROPY_MASS, LIMBS, InputKind, QuantizedInput
from gircse.checkpoint.reference import Reweight, Variation, all_probabilities

RoundedWeights = Callable[[str], RoundedWeight]
"""Returns the rounded weight of a projection; that of the vocabulary is rounded when it is loaded."""


def quantized(
    inputs: Collection[QuantizedInput],
    calibrations: Mapping[str, InputCalibration],
    weights: RoundedWeights,
    soft_token: SoftTokenCalibration | None,
) -> Variation:
    """Return the variation of the reference with some inputs quantized.

    Args:
        inputs: what to quantize.
        calibrations: of at least these inputs, by name.
        weights: of ``round_weights``.
        soft_token: how soft tokens are made; None sums up all tokens.
    """
    changed = functools.partial(_quantized_inputs, inputs, calibrations, weights)
    return Variation(changed, soft_token_reweighting(soft_token))


@contextmanager
def _quantized_inputs(
    inputs: Collection[QuantizedInput],
    calibrations: Mapping[str, InputCalibration],
    weights: RoundedWeights,
    model: Any,
    loaded: str,
    _rows: slice,
) -> Iterator[None]:
    """Quantize those inputs whose weights are loaded while the block runs; the model is restored afterwards."""
    with ExitStack() as undo:
        for quantized_input in inputs:
            calibration = calibrations[quantized_input.name]
            for name in quantized_input.projections:
                if loaded and not f"{name}.".startswith(f"{loaded}."):
                    continue
                module = model.get_submodule(name)
                exact: Tensor = module.weight.data
                is_vocabulary = quantized_input.kind is InputKind.VOCABULARY
                rounded = round_weight(exact, calibration, None) if is_vocabulary else weights(name)
                undo.callback(setattr, module.weight, "data", exact)
                hook = _activation_hook(quantized_input, calibration, exact.device)
                undo.callback(module.register_forward_pre_hook(hook).remove)
                module.weight.data = dequantized(rounded, calibration.outlier_channels, exact.device).to(exact.dtype)
        yield


def soft_token_reweighting(calibration: SoftTokenCalibration | None) -> Reweight:
    """Return how an INT8 variant makes soft tokens: the top-k tokens, and the calibrated tail for the remaining mass.

    A high-entropy softmax, whose remaining mass exceeds ``HIGH_ENTROPY_MASS``, is summed over all tokens. Without a
    calibration (K = 0) all tokens are.
    """
    if calibration is None:
        return all_probabilities
    tail = torch.tensor(calibration.tail)

    def reweight(probabilities: Tensor) -> tuple[Tensor, Tensor]:
        top = probabilities.topk(min(calibration.top_k, probabilities.shape[1]))
        left = 1 - top.values.sum(1, keepdim=True)
        is_flat = left > HIGH_ENTROPY_MASS
        kept = torch.zeros_like(probabilities).scatter(1, top.indices, top.values)
        return torch.where(is_flat, probabilities, kept), torch.where(is_flat, 0, left * tail.to(probabilities))

    return reweight


def _activation_hook(
    quantized_input: QuantizedInput, calibration: InputCalibration, device: torch.device
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    scales = (torch.tensor(calibration.smoothing) if calibration.smoothing else torch.ones(1)).to(device)
    channels = list(calibration.outlier_channels)

    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        smoothed = arguments[0].float() / scales
        rounded = quantize_rows(smoothed, threshold=calibration.threshold, limbs=LIMBS[quantized_input.kind])
        rounded[..., channels] = smoothed[..., channels]
        return (rounded.to(arguments[0].dtype),)

    return hook


def round_weight(weight: Tensor, calibration: InputCalibration, moments: Moments | None) -> RoundedWeight:
    """Round a weight that reads an input.

    Args:
        weight: (out, in).
        calibration: smoothing and outlier channels of the input.
        moments: its blocks of H; None rounds to nearest.
    """
    scales = torch.tensor(calibration.smoothing, device=weight.device) if calibration.smoothing else None
    return round_smoothed(weight.float(), scales, calibration.outlier_channels, moments)


def dequantized(weight: RoundedWeight, outlier_channels: Sequence[int], device: torch.device) -> Tensor:
    """Return the smoothed weight (out, in) as the variant multiplies with it."""
    wide = weight.integers.to(device) * weight.scales.to(device)[:, None]
    wide[:, list(outlier_channels)] = weight.columns.to(device)
    return wide
