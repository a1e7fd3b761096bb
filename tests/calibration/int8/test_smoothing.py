"""Smoothing and outlier channels are chosen where they reduce the error of the quantized product, not elsewhere."""

import pytest
import torch

from gircse.calibration.int8.smoothing import (
    MIGRATIONS,
    Smoothing,
    largest_channels,
    product_error,
    search_smoothing,
    smoothing_scales,
)

ROWS, INPUTS, OUTPUTS = 128, 256, 48


def example(*, spikes: int, size: float = 1e4) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of which the first has a few huge channels, and a weight."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, INPUTS, generator=generator)
    rows[0, :spikes] = size
    return rows, torch.randn(OUTPUTS, INPUTS, generator=generator)


def search(rows: torch.Tensor, weight: torch.Tensor, *, limbs: int, migrations: tuple[float | None, ...]) -> Smoothing:
    return search_smoothing(
        rows, [weight[:9], weight[9:]], rows.abs().amax(0), limbs=limbs, outlier_channels=8, migrations=migrations
    )


@pytest.mark.parametrize("limbs", [1, 2])
def test_huge_channels_are_excluded(limbs: int) -> None:
    rows, weight = example(spikes=3)
    found = search(rows, weight, limbs=limbs, migrations=())
    assert {0, 1, 2} <= set(found.outlier_channels)
    assert len(found.outlier_channels) == 8
    channels = largest_channels(rows.abs().amax(0), 2)
    fewer = product_error(rows @ weight.T, rows, weight, torch.ones(INPUTS), channels, threshold=1e4, limbs=limbs)
    assert found.error < fewer / 100


def test_no_channel_is_excluded_without_need() -> None:
    rows, weight = example(spikes=0)
    assert search(rows, weight, limbs=2, migrations=()).outlier_channels == ()


def test_smoothing_moves_outliers_into_the_weight() -> None:
    rows, weight = example(spikes=0)
    rows[:, ::16] *= 50  # more channels than may be excluded
    found = search(rows, weight, limbs=1, migrations=MIGRATIONS)
    assert found.migration is not None
    unsmoothed = search(rows, weight, limbs=1, migrations=())
    assert found.error < unsmoothed.error / 4


def test_scales_by_hand() -> None:
    """With a = 3/4: x^(3/4) / w^(1/4) is 8 and 1/2, and 4 and 1/4 with a geometric mean of 1."""
    scales = smoothing_scales(torch.tensor([16.0, 1.0]), torch.tensor([1.0, 16.0]), 0.75)
    torch.testing.assert_close(scales, torch.tensor([4.0, 0.25]))
