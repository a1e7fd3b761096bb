"""The numbers of E4M3 and their scales."""

import math

import onnx_ir as ir
import pytest
import torch

from gircse.calibration.int8.gptq import round_smoothed
from gircse.calibration.int8.rounding import quantize_weight
from gircse.export.fp8.e4m3 import E4M3_GRID, E4M3_MAX, MIN_SCALE, e4m3_step
from gircse.export.fp8.weights import Fp8Product
from gircse.runtime.errors import ExportError


def test_every_number_rounds_to_itself_and_the_largest_stays() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    assert (len(numbers), float(numbers.max())) == (254, E4M3_MAX)
    assert torch.equal(E4M3_GRID.round(numbers.clone()), numbers)
    beyond = torch.tensor([449.0, 465.0, 1e30, math.inf])
    assert E4M3_GRID.round(beyond.clone()).tolist() == [E4M3_MAX] * 4
    assert E4M3_GRID.round(-beyond).tolist() == [-E4M3_MAX] * 4


def test_scales_are_normal_fp16_numbers_that_hold_the_magnitude() -> None:
    magnitudes = torch.cat([torch.zeros(1), torch.logspace(-9, 6, 1000)])
    scales = E4M3_GRID.scales(magnitudes)
    assert torch.equal(scales.half().float(), scales)
    assert float(scales.min()) == MIN_SCALE
    assert bool((scales * E4M3_MAX >= magnitudes).all())
    large = magnitudes > MIN_SCALE * E4M3_MAX
    assert bool((scales[large] * E4M3_MAX <= magnitudes[large] * (1 + 2**-10)).all())


def test_weights_of_any_size_are_off_by_a_sixteenth_at_most() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 6)[:, None]
    weight[3] = 0
    numbers, scales = quantize_weight(weight, E4M3_GRID)
    assert (numbers.dtype, scales.shape) == (torch.float8_e4m3fn, (6,))
    near_zero = scales[:, None] * 2**-10  # half of the smallest number
    assert bool(((numbers.float() * scales[:, None] - weight).abs() <= weight.abs() / 16 + near_zero).all())


def test_gptq_rounds_to_e4m3_and_loses_less_than_the_nearest_numbers() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 64, generator=generator)
    inputs = torch.randn(512, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    inputs += 0.1 * torch.randn(512, 64, generator=generator)
    moments = [inputs.T @ inputs]

    def error(rounded: torch.Tensor) -> float:
        return float((inputs @ (rounded - weight).T).norm())

    parts = [round_smoothed(weight, None, (5,), found, grid=E4M3_GRID) for found in (moments, None)]
    ours, nearest = (part.integers.float() * part.scales[:, None] for part in parts)
    for part, wide in zip(parts, (ours, nearest), strict=True):
        assert part.integers.dtype is torch.float8_e4m3fn
        wide[:, [5]] = part.columns
    assert error(ours) < 0.7 * error(nearest)


def test_steps_of_activations() -> None:
    assert e4m3_step(0.0, "x") == MIN_SCALE
    assert e4m3_step(448.0, "x") == 1.0
    with pytest.raises(ExportError, match=r"x has a magnitude of 70000; the FP16 maximum is 65504\. .*--keep-float32"):
        e4m3_step(70000.0, "x")
    assert math.isinf(torch.tensor(65504 / E4M3_MAX).half() * 448)  # why less than the FP16 maximum is refused too
    with pytest.raises(ExportError, match="has a magnitude of 65520"):
        e4m3_step(65504.0, "x")


def test_weights_of_a_product_are_what_it_declares() -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    source = Fp8Product("p", {"w": (6, 16)}, torch.full((16,), 2.0), (3,))
    made = source.tensors(lambda _: iter([weight]))
    types = {ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn, ir.DataType.FLOAT16: torch.float16}
    assert {name: (spec.shape, types[spec.dtype]) for name, spec in source.initializers.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()
    }
    wide = made["p.fp8"].float() * made["p.scale"].float()
    wide[3] = made["p.float"].float()[0]
    assert float((wide.T / (2 * weight) - 1).abs().max()) <= 1 / 16


@pytest.mark.parametrize(("column", "name"), [(0, r"p\.scale"), (3, r"p\.float")])
def test_weights_that_fp16_cannot_hold(column: int, name: str) -> None:
    weight = torch.ones(6, 16)
    weight[2, column] = 7e4
    with pytest.raises(ExportError, match=rf"{name} has a magnitude of 700\d\d; the FP16 maximum is 65504\."):
        Fp8Product("p", {"w": (6, 16)}, None, (3,)).tensors(lambda _: iter([weight]))
