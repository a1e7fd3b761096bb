"""Rounding to symmetric INT8: activations in limbs, weights with a scale per output channel."""

import pytest
import torch

from gircse.calibration.int8.rounding import (
    WeightGrid,
    least_error_scales,
    quantize_rows,
    quantize_weight,
    split_weight,
)

ROWS = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))


def test_a_lo_limb_is_254_times_finer() -> None:
    limit = float(ROWS.abs().max())
    one, two = ((quantize_rows(ROWS, threshold=limit, limbs=limbs) - ROWS).abs().max() for limbs in (1, 2))
    assert one <= limit / 254 * 1.001
    assert two <= one / 254 * 1.1


@pytest.mark.parametrize("limbs", [1, 2])
def test_what_exceeds_the_threshold_is_clipped(limbs: int) -> None:
    rounded = quantize_rows(torch.tensor([0.5, -3.0, 100.0]), threshold=1.0, limbs=limbs)
    assert rounded[1:].abs().max() <= 1.0 + (0.51 / 127 if limbs == 2 else 1e-6)
    assert quantize_rows(torch.zeros(3), threshold=0.0, limbs=limbs).eq(0).all()


def test_a_weight_has_one_scale_per_output() -> None:
    weight = torch.cat([ROWS[:4], torch.zeros(1, 256)])
    integers, scales = quantize_weight(weight)
    assert (integers.dtype, scales.shape) == (torch.int8, (5,))
    assert integers[:4].abs().amax(1).tolist() == [127] * 4
    assert scales[4] == 1
    assert ((integers * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()


def test_a_split_weight_is_the_smoothed_weight() -> None:
    scales = torch.linspace(0.5, 2, 256)
    rest, columns = split_weight(ROWS, scales, (3, 200))
    assert not rest[:, [3, 200]].any()
    rest[:, [3, 200]] = columns
    assert torch.equal(rest, ROWS * scales)


def test_blocks_of_four_bits() -> None:
    weight = torch.cat([ROWS[:4], torch.zeros(1, 256)])
    integers, scales = quantize_weight(weight, WeightGrid(4, 32))
    assert (integers.shape, scales.shape) == (weight.shape, (5, 8))
    assert integers[:4].reshape(4, 8, 32).abs().amax(2).eq(7).all()
    wide = scales.repeat_interleave(32, dim=1)
    assert ((integers * wide - weight).abs() <= wide * 0.5001).all()


def test_scales_of_least_error_clip_only_where_that_is_better() -> None:
    grid, energy = WeightGrid(4, 32), torch.ones(256)

    def errors(scales: torch.Tensor) -> torch.Tensor:
        wide = scales.repeat_interleave(32, dim=1)
        rounded = (ROWS / wide).round().clamp(-7, 7) * wide
        return ((rounded - ROWS).square() * energy).reshape(len(ROWS), 8, 32).sum(2)

    widest = quantize_weight(ROWS, grid)[1]
    best = least_error_scales(ROWS, grid, energy)
    assert (errors(best) <= errors(widest)).all()
    assert errors(best).sum() < 0.9 * errors(widest).sum()
    energy[::32] = 1e6  # the first input of every block alone counts: it is not clipped any more
    first = least_error_scales(ROWS, grid, energy)
    assert (errors(first) <= errors(best) * 1.0001).all()
    assert torch.equal(least_error_scales(torch.zeros(2, 32), grid, torch.ones(32)), torch.ones(2, 1))
