"""Soft tokens of the top-k tokens and a tail, and a model that is as before after it was quantized."""

import pytest
import torch
from support.small_models import SmallModels

from gircse.calibration.calibration_file import InputCalibration, SoftTokenCalibration
from gircse.calibration.int8.fake_quantization import quantized, round_weight, soft_token_reweighting
from gircse.calibration.int8.scheme import HIGH_ENTROPY_MASS, decoder_inputs

TABLE = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))


def soft_token(calibration: SoftTokenCalibration | None, probabilities: torch.Tensor) -> torch.Tensor:
    weights, rest = soft_token_reweighting(calibration)(probabilities)
    return weights @ TABLE if rest is None else weights @ TABLE + rest


def test_top_k_tokens_and_a_tail() -> None:
    probabilities = torch.full((1, 50), 0.2 / 48)
    probabilities[0, :2] = torch.tensor([0.5, 0.3])
    made = soft_token(SoftTokenCalibration(2, (1.0,) * 8), probabilities)
    torch.testing.assert_close(made, 0.5 * TABLE[:1] + 0.3 * TABLE[1:2] + 0.2)


def test_a_high_entropy_softmax_is_summed_whole() -> None:
    probabilities = torch.full((1, 50), 1 / 50)
    assert 1 - 2 / 50 > HIGH_ENTROPY_MASS
    made = soft_token(SoftTokenCalibration(2, (100.0,) * 8), probabilities)
    torch.testing.assert_close(made, TABLE.mean(0, keepdim=True))


def test_without_steps_the_product_is_exact() -> None:
    probabilities = torch.full((1, 50), 1 / 50)
    assert torch.equal(soft_token(None, probabilities), probabilities @ TABLE)


@pytest.mark.parametrize("index", [0, 3])
def test_the_model_is_restored(small_models: SmallModels, index: int) -> None:
    model, quantized_input = small_models.load("llama"), decoder_inputs(2)[index]
    module = model.get_submodule(quantized_input.projections[0])
    calibration = InputCalibration(None, (), (1,), (1.0,), (1.0,), 0.0)
    weights = {
        name: round_weight(model.get_submodule(name).weight.detach(), calibration, None)
        for name in quantized_input.projections
    }
    variation = quantized([quantized_input], {quantized_input.name: calibration}, weights.__getitem__, None)
    rows = torch.linspace(-0.9, 0.9, module.in_features)[None]
    with torch.no_grad():
        before = module(rows)
        with variation.changed(model, "", slice(None)):
            inside = module(rows)
        after = module(rows)
    assert torch.equal(before, after)
    assert 0 < (inside - before).abs().max() < 0.05 * before.abs().max()
