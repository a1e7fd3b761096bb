"""Rounds weights by the second moments of their inputs: GPTQ (E. Frantar et al., arXiv 2210.17323).

Rounding every weight to the nearest step minimizes the error of the weights, not of the products. With H = sum x x^T
over the calibration's inputs, the error of x W^T is (W - Q) H (W - Q)^T: the columns are rounded one at a time, and the
columns that follow compensate for the error of each, as far as inputs are correlated. Columns that are excluded from
quantization come last and compensate for what is left. With scales for blocks of inputs, which 4 bits need, the columns
of the largest inputs come first, while there are many others to compensate, and a scale may clip where that is better.

Only the diagonal blocks of H, of neighboring inputs, are held: the whole of it has as many elements as an MLP has
inputs, squared. Every x is divided by its norm first, so that the relative error of a token counts and massive first
tokens do not outweigh the rest.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gircse.calibration.int8.rounding import (
    INT8_PER_CHANNEL,
    WeightGrid,
    least_error_scales,
    quantize_weight,
    split_weight,
    weight_scales,
)

BLOCK_INPUTS = 512
"""Inputs in a block of H. Demo: 512 is as good as all of them, 128 gives a third of the gain."""

DAMPING = 0.01
"""Share of the mean diagonal of H that is added to it, as in GPTQ."""

_FEW = 16
"""Columns that are rounded one by one before the others of a block see their errors: so few that they stay in the
CPU's cache."""

_TINY = 1e-12

Moments = Sequence[Tensor]
"""The blocks of H, (b, b) float32 each, along its diagonal."""


@dataclass(frozen=True)
class RoundedWeight:
    """A weight as a quantized product reads it.

    Attributes:
        integers: (out, in) numbers of the grid, in its type; 0 in the excluded columns.
        scales: (out,) or (out, in / block) float32, see ``weight_scales``.
        columns: (out, n) float32, the columns that are excluded from quantization.
    """

    integers: Tensor
    scales: Tensor
    columns: Tensor


def moment_blocks(width: int) -> list[slice]:
    """Return the range of inputs in each block of H."""
    return [slice(start, min(start + BLOCK_INPUTS, width)) for start in range(0, width, BLOCK_INPUTS)]


def no_moments(width: int) -> list[Tensor]:
    """Return the blocks of H before any row was added."""
    sizes = [inputs.stop - inputs.start for inputs in moment_blocks(width)]
    return [torch.zeros(size, size) for size in sizes]


def add_moments(moments: Moments, rows: Tensor) -> None:
    """Add rows (n, in) float32 to the blocks of H, in place."""
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=_TINY)
    for block, inputs in zip(moments, moment_blocks(rows.shape[1]), strict=True):
        block += (rows[:, inputs].T @ rows[:, inputs]).to(block.device)


def largest_moments(moments: Moments, count: int) -> tuple[int, ...]:
    """Return the channels that add most to the error of products where only weights are rounded.

    With one step for all inputs of an output, the expected error is the step's square times the sum of H's diagonal
    over the rounded channels.

    Args:
        moments: the blocks of H.
        count: number of channels.

    Returns:
        Their numbers, sorted; none if that is all of them.
    """
    energy = torch.cat([block.diag() for block in moments])
    return tuple(sorted(energy.topk(count).indices.tolist())) if count < len(energy) else ()


def round_smoothed(
    weight: Tensor,
    scales: Tensor | None,
    outlier_channels: Sequence[int],
    moments: Moments | None,
    *,
    grid: WeightGrid = INT8_PER_CHANNEL,
) -> RoundedWeight:
    """Smooth a weight and round it.

    Args:
        weight: (out, in) float32.
        scales: (in,) float32, s of SmoothQuant; None for 1.
        outlier_channels: columns that are excluded from quantization.
        moments: H of the inputs before smoothing; None rounds to nearest.
        grid: what it is rounded to.
    """
    scales = weight.new_ones(weight.shape[1]) if scales is None else scales
    channels = list(outlier_channels)
    smoothed, columns = split_weight(weight, scales, tuple(channels))
    if moments is None:
        return RoundedWeight(*quantize_weight(smoothed, grid), columns)
    blocks = zip(moments, moment_blocks(weight.shape[1]), strict=True)
    scaled = [block.to(scales.device) / (scales[inputs, None] * scales[None, inputs]) for block, inputs in blocks]
    if grid.block is None:
        steps = weight_scales(smoothed, grid)
    else:
        steps = least_error_scales(smoothed, grid, torch.cat([block.diag() for block in scaled]))
    smoothed[:, channels] = columns
    integers, columns = round_columns(smoothed, steps.reshape(len(steps), -1), scaled, excluded=channels, grid=grid)
    return RoundedWeight(integers, steps, columns)


def round_columns(
    weight: Tensor,
    steps: Tensor,
    moments: Moments,
    *,
    excluded: Sequence[int] = (),
    grid: WeightGrid = INT8_PER_CHANNEL,
) -> tuple[Tensor, Tensor]:
    """Round the columns of a weight by H.

    Args:
        weight: (out, in) float32.
        steps: (out, groups) float32; ``in / groups`` neighboring columns share a step.
        moments: H of the weight's inputs.
        excluded: columns that are not rounded.
        grid: what the others are rounded to.

    Returns:
        Numbers of the grid (out, in) in its type, 0 in the excluded columns, and the excluded columns (out, n) float32.
    """
    group = weight.shape[1] // steps.shape[1]
    columns = weight.T.contiguous()  # a column is a row here, contiguous in memory
    integers = torch.zeros_like(columns, dtype=grid.dtype)
    is_excluded = torch.zeros(len(columns), dtype=torch.bool, device=weight.device)
    is_excluded[list(excluded)] = True
    with _one_thread():
        for moment, inputs in zip(moments, moment_blocks(len(columns)), strict=True):
            parts = [torch.nonzero(is_excluded[inputs] == last).squeeze(1) for last in (False, True)]
            if steps.shape[1] > 1:
                parts[0] = parts[0][moment.diag()[parts[0]].argsort(descending=True, stable=True)]
            order = torch.cat(parts)
            factor = _inverse_factor(moment[order][:, order])
            order += inputs.start
            block = columns[order]
            block_steps = [steps[:, column // group] for column in order.tolist()[: len(parts[0])]]
            integers[order[: len(parts[0])]] = _round_block(block, block_steps, factor, grid)
            columns[order] = block
    return integers.T.contiguous(), columns[list(excluded)].T.contiguous()


def _round_block(block: Tensor, steps: Sequence[Tensor], factor: Tensor, grid: WeightGrid) -> Tensor:
    """Round the first columns of a block, and let those after them compensate, in place.

    The columns are halved until few are left: errors go to the columns of the other half in one matrix product, which
    is many times as fast as one column at a time.

    Args:
        block: (b, out) float32, columns as rows.
        steps: (out,) float32 of each column that is rounded; the columns after them are not.
        factor: (b, b) float32, of ``_inverse_factor``.
        grid: what they are rounded to.

    Returns:
        Numbers of the grid (len(steps), out), in its type.
    """
    rounded = torch.empty_like(block[: len(steps)], dtype=grid.dtype)
    errors = torch.empty_like(block[: len(steps)])

    def compensate(start: int, middle: int, stop: int) -> None:
        block[middle:stop].addmm_(factor[start:middle, middle:stop].T, errors[start:middle], alpha=-1)

    def round_range(start: int, stop: int) -> None:
        if stop - start > _FEW:
            middle = (start + stop) // 2
            round_range(start, middle)
            compensate(start, middle, stop)
            round_range(middle, stop)
            return
        for j in range(start, stop):
            levels = grid.round(block[j] / steps[j])
            rounded[j] = levels
            torch.sub(block[j], levels.mul_(steps[j]), out=errors[j]).div_(factor[j, j])
            block[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j], alpha=-1)

    round_range(0, len(steps))
    compensate(0, len(steps), len(block))
    return rounded


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: a column is so short that threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _inverse_factor(moment: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of damped H: row j tells how columns after j compensate for j."""
    moment = moment.double()
    damped = moment + torch.eye(len(moment)).to(moment) * (DAMPING * moment.diag().mean() + _TINY)
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor.float()
