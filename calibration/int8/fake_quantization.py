"""Emulates the ``int8`` variant in the PyTorch reference: every quantized value is rounded to its integers and back.

The sensitivity is measured with it, because it quantizes one input or layer at a time without an export. Integer
products are exact, so it differs from the exported graph only by the order of float sums (a test compares the two).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gircse.calibration.calibration_file import InputCalibration, SoftTokenCalibration
from gircse.calibration.int8.gptq import Moments, RoundedWeight, round_smoothed
from gircse.calibration.int8.rounding import quantize_rows
from gircse.calibration.int8.scheme import HIGH_ENTROPY_MASS, LIMBS, QuantizedInput
from gircse.checkpoint.reference import Reweight, all_probabilities


@contextmanager
def quantized_inputs(
    model: Any,
    inputs: Collection[QuantizedInput],
    calibrations: Mapping[str, InputCalibration],
    weights: Mapping[str, RoundedWeight],
) -> Iterator[None]:
    """Quantize some inputs and the weights that read them while the block runs; the model is restored afterwards.

    Args:
        model: a ``transformers`` causal LM in FP32.
        inputs: what to quantize.
        calibrations: of at least these inputs, by name.
        weights: of ``round_weights``, by projection.
    """
    modules = dict(model.named_modules())
    with ExitStack() as undo:
        for quantized_input in inputs:
            calibration = calibrations[quantized_input.name]
            hook = _activation_hook(quantized_input, calibration)
            for name in quantized_input.projections:
                module = modules[name]
                undo.callback(setattr, module.weight, "data", module.weight.data)
                undo.callback(module.register_forward_pre_hook(hook).remove)
                wide = _dequantized(weights[name], calibration.outlier_channels)
                module.weight.data = wide.to(module.weight.device)
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
    quantized_input: QuantizedInput, calibration: InputCalibration
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    scales = torch.tensor(calibration.smoothing) if calibration.smoothing else torch.ones(1)
    channels = list(calibration.outlier_channels)

    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        smoothed = arguments[0] / scales.to(arguments[0].device)
        rounded = quantize_rows(smoothed, threshold=calibration.threshold, limbs=LIMBS[quantized_input.kind])
        rounded[..., channels] = smoothed[..., channels]
        return (rounded,)

    return hook


def round_weights(
    model: Any, quantized_input: QuantizedInput, calibration: InputCalibration, moments: Moments | None
) -> dict[str, RoundedWeight]:
    """Round the weights that read an input, by projection.

    Args:
        model: a ``transformers`` causal LM in FP32.
        quantized_input: what they read.
        calibration: its smoothing and outlier channels.
        moments: its blocks of H; None rounds to nearest.
    """
    rounded = {}
    for name in quantized_input.projections:
        weight = model.get_submodule(name).weight.detach().cpu()
        scales = torch.tensor(calibration.smoothing) if calibration.smoothing else None
        rounded[name] = round_smoothed(weight, scales, calibration.outlier_channels, moments)
    return rounded


def _dequantized(weight: RoundedWeight, outlier_channels: Sequence[int]) -> Tensor:
    """Return the smoothed weight (out, in) as the variant multiplies with it."""
    wide = weight.integers * weight.scales[:, None]
    wide[:, list(outlier_channels)] = weight.columns
    return wide
