"""Smoothing and float channels: chosen where the quantised product gains by them, and not elsewhere."""

import pytest
import torch

from gircse.calibration.int8.smoothing import (
    MIGRATIONS,
    Smoothing,
    largest_channels,
    product_error,
    quantize_rows,
    search_smoothing,
)

ROWS, INPUTS, OUTPUTS = 128, 256, 48


def example(*, spikes: int, size: float = 1e4) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of which the first has a few huge channels, and a weight."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, INPUTS, generator=generator)
    rows[0, :spikes] = size
    return rows, torch.randn(OUTPUTS, INPUTS, generator=generator)


def search(rows: torch.Tensor, weight: torch.Tensor, *, digits: int, migrations: tuple[float | None, ...]) -> Smoothing:
    return search_smoothing(rows, weight, rows.abs().amax(0), digits=digits, float_channels=8, migrations=migrations)


@pytest.mark.parametrize("digits", [1, 2])
def test_channels_stay_in_float_where_they_are_huge(digits: int) -> None:
    rows, weight = example(spikes=3)
    found = search(rows, weight, digits=digits, migrations=())
    assert {0, 1, 2} <= set(found.float_channels)
    assert len(found.float_channels) == 8
    channels = largest_channels(rows.abs().amax(0), 2)
    fewer = product_error(rows, weight, torch.ones(INPUTS), channels, threshold=1e4, digits=digits)
    assert found.error < fewer / 100


def test_no_channel_stays_in_float_for_nothing() -> None:
    rows, weight = example(spikes=0)
    assert search(rows, weight, digits=2, migrations=()).float_channels == ()


def test_smoothing_moves_outliers_into_the_weight() -> None:
    rows, weight = example(spikes=0)
    rows[:, ::16] *= 50  # more channels than may stay in float
    found = search(rows, weight, digits=1, migrations=MIGRATIONS)
    assert found.migration is not None
    unsmoothed = search(rows, weight, digits=1, migrations=())
    assert found.error < unsmoothed.error / 4


def test_a_second_digit_is_254_times_finer() -> None:
    rows, _ = example(spikes=0)
    limit = float(rows.abs().max())
    one, two = ((quantize_rows(rows, threshold=limit, digits=digits) - rows).abs().max() for digits in (1, 2))
    assert one <= limit / 254 * 1.001
    assert two <= one / 254 * 1.1
