"""Rounding to symmetric INT8: activations in limbs, weights with a scale per output channel."""

import pytest
import torch

from gircse.calibration.int8.rounding import quantize_rows, quantize_weight, split_weight

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
