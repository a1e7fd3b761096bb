"""Rounding by the inputs' second moments is GPTQ, and products lose less by it than by rounding to nearest."""

import numpy as np
import pytest
import torch
from torch import Tensor

from gircse.calibration.int8 import gptq
from gircse.calibration.int8.gptq import (
    DAMPING,
    add_moments,
    largest_moments,
    moment_blocks,
    no_moments,
    round_columns,
    round_smoothed,
)
from gircse.calibration.int8.rounding import WeightGrid

INPUTS, OUTPUTS = 48, 20


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "BLOCK_INPUTS", 32)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def correlated_rows(count: int = 400) -> Tensor:
    """Rows whose inputs are correlated: five directions and a little noise."""
    return seeded(count, 5) @ seeded(5, INPUTS, seed=1) + 0.1 * seeded(count, INPUTS, seed=2)


def moments_of(rows: Tensor) -> list[Tensor]:
    moments = no_moments(rows.shape[1])
    add_moments(moments, rows)
    return moments


def product_error(rows: Tensor, weight: Tensor, rounded: Tensor) -> float:
    rows = rows / rows.norm(dim=1, keepdim=True)
    return float((rows @ (weight - rounded).T).square().sum())


def plain_gptq(weight: Tensor, steps: Tensor, moment: Tensor) -> Tensor:
    """GPTQ by its definition: round a column, solve for the best change of those that follow, in float64."""
    weight, moment = weight.double().clone(), moment.double()
    moment = moment + torch.eye(len(moment), dtype=torch.float64) * DAMPING * moment.diag().mean()
    rounded = torch.zeros_like(weight)
    for j in range(len(moment)):
        rounded[:, j] = (weight[:, j] / steps[:, 0]).round().clamp(-127, 127) * steps[:, 0]
        error = weight[:, j] - rounded[:, j]
        rest = torch.linalg.solve(moment[j + 1 :, j + 1 :], moment[j + 1 :, j])
        weight[:, j + 1 :] += torch.outer(error, rest)
    return rounded


def test_is_gptq() -> None:
    weight, rows = seeded(OUTPUTS, INPUTS, seed=3), correlated_rows()
    (moment,) = moments_of(rows)
    steps = weight.abs().amax(1, keepdim=True) / 20  # coarse, so that a fault shows
    integers, _ = round_columns(weight, steps, [moment])
    expected = plain_gptq(weight, steps, moment)
    assert ((integers * steps - expected).abs() > steps / 2).double().mean() < 0.01  # a few roundings at the edge


@pytest.mark.usefixtures("small_blocks")
def test_products_lose_less_than_by_rounding_to_nearest() -> None:
    weight, rows = seeded(OUTPUTS, INPUTS, seed=3), correlated_rows()
    assert [block.shape for block in moments_of(rows)] == [(32, 32), (16, 16)]
    scales, channels = torch.linspace(0.5, 2, INPUTS), (3, 40)
    errors = {}
    for name, moments in (("nearest", None), ("seen", moments_of(rows))):
        rounded = round_smoothed(weight, scales, channels, moments)
        assert not rounded.integers[:, list(channels)].any()
        wide = rounded.integers * rounded.scales[:, None]
        wide[:, list(channels)] = rounded.columns
        errors[name] = product_error(rows, weight, wide / scales)
    assert errors["seen"] < 0.4 * errors["nearest"]


@pytest.mark.usefixtures("small_blocks")
def test_four_bits_in_blocks_lose_less_than_by_rounding_to_nearest() -> None:
    weight, rows = seeded(OUTPUTS, INPUTS, seed=3), correlated_rows()
    errors = {}
    for name, moments in (("nearest", None), ("seen", moments_of(rows))):
        rounded = round_smoothed(weight, None, (3, 40), moments, grid=WeightGrid(4, 16))
        assert (rounded.integers.abs().max(), rounded.scales.shape) == (7, (OUTPUTS, INPUTS // 16))
        wide = rounded.integers * rounded.scales.repeat_interleave(16, dim=1)
        wide[:, [3, 40]] = rounded.columns
        errors[name] = product_error(rows, weight, wide)
    assert errors["seen"] < 0.4 * errors["nearest"]


@pytest.mark.usefixtures("small_blocks")
def test_the_columns_of_large_inputs_are_rounded_first() -> None:
    """While there are others to compensate: in the order of the columns this error is larger."""
    weight, rows = seeded(OUTPUTS, INPUTS, seed=3), correlated_rows()
    rows[:, [15, 31]] *= 20  # the last of a block of inputs, and of a block of H
    steps = weight.reshape(OUTPUTS, -1, 16).abs().amax(-1) / 7
    (moments, one_step) = (moments_of(rows), steps.repeat_interleave(16, dim=1))
    integers, _ = round_columns(weight, steps, moments, grid=WeightGrid(4, 16))
    ours = product_error(rows, weight, integers * one_step)
    nearest = (weight / one_step).round() * one_step
    assert ours < 0.2 * product_error(rows, weight, nearest)


@pytest.mark.usefixtures("small_blocks")
def test_largest_moments_are_the_loudest_channels_in_every_block() -> None:
    rows = seeded(100, INPUTS)
    rows[:, [5, 40]] *= 10
    assert largest_moments(moments_of(rows), 2) == (5, 40)
    assert largest_moments(moments_of(rows), 0) == ()
    assert largest_moments(moments_of(rows), INPUTS) == ()


@pytest.mark.usefixtures("small_blocks")
def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    weight = seeded(OUTPUTS, INPUTS, seed=3)
    moments = [torch.eye(inputs.stop - inputs.start) for inputs in moment_blocks(INPUTS)]
    steps = weight.reshape(OUTPUTS, -1, 16).abs().amax(-1) / 127
    integers, _ = round_columns(weight, steps, moments)
    nearest = (weight / steps.repeat_interleave(16, dim=1)).round()
    assert torch.equal(integers.float(), nearest)


def test_inputs_that_are_always_zero() -> None:
    weight = seeded(OUTPUTS, INPUTS, seed=3)
    rounded = round_smoothed(weight, torch.ones(INPUTS), (), no_moments(INPUTS))
    assert torch.equal(rounded.integers, round_smoothed(weight, torch.ones(INPUTS), (), None).integers)


def test_a_token_counts_whatever_its_size() -> None:
    rows = correlated_rows()
    sizes = torch.logspace(-3, 3, len(rows))[:, None]
    torch.testing.assert_close(moments_of(rows * sizes), moments_of(rows))
