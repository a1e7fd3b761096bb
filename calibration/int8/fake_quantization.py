"""The ``int8`` variant computed by the PyTorch reference: every quantized value rounded to its integers and back.

It is what the sensitivity is measured with, because one input or layer can be quantized at a time without an export.
Integer products are exact, so it differs from the exported graph by the order of float sums only (a test compares).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gircse.calibration.calibration_file import InputCalibration, SoftTokenCalibration
from gircse.calibration.int8.gptq import Moments, RoundedWeight, round_smoothed
from gircse.calibration.int8.scheme import LIMBS, QuantizedInput
from gircse.calibration.int8.smoothing import quantize_rows
from gircse.calibration.observe import FLAT_MASS
from gircse.checkpoint.reference import Mixture


@contextmanager
def quantized_inputs(
    model: Any,
    sites: Collection[QuantizedInput],
    calibrations: Mapping[str, InputCalibration],
    weights: Mapping[str, RoundedWeight],
) -> Iterator[None]:
    """Quantize some inputs and the weights that read them while the block runs; the model is restored afterwards.

    Args:
        model: a ``transformers`` causal LM in FP32.
        sites: what to quantize.
        calibrations: of at least these sites.
        weights: of ``round_weights``, by projection.
    """
    modules = dict(model.named_modules())
    with ExitStack() as undo:
        for site in sites:
            calibration = calibrations[site.name]
            hook = _activation_hook(site, calibration)
            for name in site.projections:
                module = modules[name]
                undo.callback(setattr, module.weight, "data", module.weight.data)
                undo.callback(module.register_forward_pre_hook(hook).remove)
                wide = _dequantized(weights[name], calibration.outlier_channels)
                module.weight.data = wide.to(module.weight.device)
        yield


def mixture_of(calibration: SoftTokenCalibration | None) -> Mixture:
    """Return the mixture of an INT8 variant: the likeliest tokens, and the calibrated tail for what they leave.

    Where they leave more than ``FLAT_MASS``, all tokens.
    """
    if calibration is None:
        return torch.matmul
    tail = torch.tensor(calibration.tail)

    def mix(probabilities: Tensor, table: Tensor) -> Tensor:
        top = probabilities.topk(min(calibration.top_k, probabilities.shape[1]))
        likeliest = (top.values[:, None] @ table[top.indices])[:, 0]
        left = 1 - top.values.sum(1, keepdim=True)
        return torch.where(left > FLAT_MASS, probabilities @ table, likeliest + left * tail.to(table))

    return mix


def _activation_hook(
    site: QuantizedInput, calibration: InputCalibration
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    scales = torch.tensor(calibration.smoothing) if calibration.smoothing else torch.ones(1)
    channels = list(calibration.outlier_channels)

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        smoothed = inputs[0] / scales.to(inputs[0].device)
        rounded = quantize_rows(smoothed, threshold=calibration.threshold, limbs=LIMBS[site.kind])
        rounded[..., channels] = smoothed[..., channels]
        return (rounded,)

    return hook


def round_weights(
    model: Any, site: QuantizedInput, calibration: InputCalibration, moments: Moments | None
) -> dict[str, RoundedWeight]:
    """Round the weights that read an input, by projection.

    Args:
        model: a ``transformers`` causal LM in FP32.
        site: the input.
        calibration: its smoothing and float channels.
        moments: its blocks of H; None rounds to nearest.
    """
    rounded = {}
    for name in site.projections:
        weight = model.get_submodule(name).weight.detach().cpu()
        scales = torch.tensor(calibration.smoothing) if calibration.smoothing else None
        rounded[name] = round_smoothed(weight, scales, calibration.outlier_channels, moments)
    return rounded


def _dequantized(weight: RoundedWeight, outlier_channels: Sequence[int]) -> Tensor:
    """Return W' (out, in) as the variant multiplies with it."""
    wide = weight.integers * weight.scales[:, None]
    wide[:, list(outlier_channels)] = weight.columns
    return wide
