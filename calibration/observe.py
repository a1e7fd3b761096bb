"""Statistics of the rows of one quantized input, separately for the prompt and each step.

They do not grow with the number of texts: the largest magnitude of every channel in the prompt and in each step, a
sample of rows, and the second moments that weights are rounded by. The texts run with their soft tokens after them, all
at once (teacher forcing), so a row is told apart by its place: padding on the left, then the prompt, then step k in
column T + k - 1. Padding is never counted. The same batches give the same statistics, bit for bit.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gircse.calibration.int8.gptq import Moments, add_moments, no_moments
from gircse.calibration.int8.histogram import MagnitudeHistogram
from gircse.calibration.int8.scheme import QuantizedInput
from gircse.calibration.int8.smoothing import Smoothing
from gircse.runtime.batch_planner import TokenBatch
from gircse.runtime.errors import CheckpointError

SAMPLE_ROWS = 256
"""Rows of each input that are sampled from the prompts, and as many from the steps."""

Watch = Callable[[QuantizedInput, Tensor], None]
"""Takes an input, and its rows (n, in) float32 of all tokens of a batch, padding included."""


@dataclass(frozen=True)
class BatchRows:
    """What the rows of a batch are, (batch, tokens) flattened.

    Attributes:
        steps: (n,) int64, the step that a row belongs to, 0 for the prompt, -1 for rows that are not counted.
        sampled: (n,) bool.
    """

    steps: Tensor
    sampled: Tensor

    def to(self, device: torch.device) -> "BatchRows":
        """Return the same on a device."""
        return BatchRows(self.steps.to(device), self.sampled.to(device))


def steps_of_rows(batch: TokenBatch, steps: int) -> Tensor:
    """Return the step of every row (batch * (tokens + K),) of prompts that are followed by their soft tokens."""
    prompt = torch.from_numpy(batch.attention_mask).long() - 1
    return torch.cat([prompt, torch.arange(1, steps + 1).expand(len(prompt), -1)], dim=1).flatten()


def sample_rows(steps: Sequence[Tensor], *, seed: int) -> list[BatchRows]:
    """Choose ``SAMPLE_ROWS`` rows of prompts, and as many of steps, from those of all batches.

    Args:
        steps: of every batch, the step of each row, -1 for rows that are not counted.
        seed: of the choice.
    """
    every = torch.cat(list(steps))
    sampled = torch.zeros(len(every), dtype=torch.bool)
    generator = np.random.default_rng(seed)
    for rows in (torch.nonzero(every == 0), torch.nonzero(every > 0)):
        chosen = generator.choice(len(rows), min(SAMPLE_ROWS, len(rows)), replace=False)
        sampled[rows[torch.from_numpy(chosen)]] = True
    parts = sampled.split([len(found) for found in steps])
    return [BatchRows(found, part) for found, part in zip(steps, parts, strict=True)]


class InputStatistics:
    """The statistics of one input, from the batches added so far.

    Attributes:
        channel_maxima: (K + 1, in) float32, prompt first.
        moments: the blocks of H, see ``int8/gptq.py``; None where weights are rounded to nearest.
    """

    def __init__(self, name: str, width: int, *, steps: int, moments: bool, device: torch.device) -> None:
        """Start with no batches.

        Args:
            name: of the input, for errors.
            width: in.
            steps: K.
            moments: whether they are needed.
            device: where the rows are.
        """
        self._name = name
        self.channel_maxima = torch.zeros(steps + 1, width, device=device)
        self.moments: Moments | None = [block.to(device) for block in no_moments(width)] if moments else None
        self._sampled: list[Tensor] = []

    def add(self, rows: Tensor, places: BatchRows) -> None:
        """Add the rows (n, in) of a batch.

        Raises:
            CheckpointError: one that counts has NaN or infinity.
        """
        for step in places.steps.unique().tolist():
            if step < 0:
                continue
            maxima = rows[places.steps == step].abs().amax(0)
            if not torch.isfinite(maxima).all():
                raise CheckpointError(
                    self._name,
                    f"has NaN or infinite values {f'at step {step}' if step else 'in the prompt'}",
                    None,
                    "The checkpoint or the adapter is damaged: download it again. Or its values are too large for "
                    "--dtype: use fp32.",
                )
            torch.maximum(self.channel_maxima[step], maxima, out=self.channel_maxima[step])
        self._sampled.append(rows[places.sampled])
        if self.moments is not None:
            add_moments(self.moments, rows[places.steps >= 0])

    @property
    def sampled_rows(self) -> Tensor:
        """The sample of rows (n, in) float32, n <= 2 * SAMPLE_ROWS."""
        return torch.cat(self._sampled)


class InputHistograms:
    """Histograms of the magnitudes of one input after smoothing, without outlier channels, in the prompt and each step.

    Attributes:
        steps: one for the prompt and each step.
    """

    def __init__(self, name: str, smoothing: Smoothing, *, steps: int) -> None:
        """Start with no batches; ``steps`` is K."""
        self._name, self._smoothing = name, smoothing
        self.steps = [MagnitudeHistogram() for _ in range(steps + 1)]

    def add(self, rows: Tensor, places: BatchRows) -> None:
        """Add the rows (n, in) of a batch."""
        smoothed = rows / self._smoothing.scales
        smoothed[:, list(self._smoothing.outlier_channels)] = 0
        for step, histogram in enumerate(self.steps):
            histogram.add(smoothed[places.steps == step].cpu().numpy(), where=self._name)


@contextmanager
def watched(model: Any, inputs: Sequence[QuantizedInput], watch: Watch) -> Iterator[None]:
    """Call ``watch`` with the rows of every input while the block runs the model."""

    def hook(quantized_input: QuantizedInput, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        watch(quantized_input, arguments[0].flatten(0, -2).float())

    with ExitStack() as hooks:
        for quantized_input in inputs:
            module: nn.Module = model.get_submodule(quantized_input.projections[0])
            hooks.callback(module.register_forward_pre_hook(functools.partial(hook, quantized_input)).remove)
        yield
