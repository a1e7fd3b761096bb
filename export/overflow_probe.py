"""The overflow probe: how large the values of a model become, in the prompt and at every refinement step.

The FP16 maximum is 65504, and decoder LLMs have a few activations thousands of times larger than the rest. The inputs
and outputs of all matrix products are recorded; nothing else in an FP16 graph is larger, except in the rotary
embedding, which can enlarge an element by sqrt(2).
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from gircse.runtime.errors import CheckpointError

Magnitudes = Mapping[str, NDArray[np.float64]]
"""Tensor name, such as ``model.layers.3.mlp.down_proj output``, to its largest magnitude: (K + 1,), prompt first."""


class MagnitudeRecorder:
    """Keeps the largest magnitude of every matrix product's input and output, in the prompt and at each step.

    Attributes:
        found: the magnitudes so far. The logits have none in the prompt, 0.
    """

    def __init__(self, steps: int) -> None:
        """Start with nothing; ``steps`` is K."""
        self.found: dict[str, NDArray[np.float64]] = {}
        self._steps, self._step = steps, 0

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record what a model computes while the block runs it with ``Reference.refine``.

        Raises:
            CheckpointError: a value is NaN or infinite even in FP32.
        """
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear):
                    hooks.callback(module.register_forward_hook(functools.partial(self._hook, name)).remove)
            yield
        _check_finite(self.found)

    def after(self, step: int) -> None:
        """Take note that a step is done: what runs before the next state belongs to the next step, or prompt."""
        self._step = step + 1 if step < self._steps else 0

    def _hook(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for what, value in (("input", inputs[0]), ("output", output)):
            maxima = self.found.setdefault(f"{name} {what}", np.zeros(self._steps + 1))
            maxima[self._step] = np.maximum(maxima[self._step], float(value.abs().amax()))


def _check_finite(magnitudes: Magnitudes) -> None:
    """Refuse NaN and infinity; of all such values, name the one that was computed first."""
    bad = [
        (int(np.isfinite(maxima).argmin()), name)
        for name, maxima in magnitudes.items()
        if not np.isfinite(maxima).all()
    ]
    if bad:
        step, name = min(bad, key=lambda found: found[0])  # within a step they stand in the order of the computation
        raise CheckpointError(
            name,
            f"has NaN or infinity at step {step}, in FP32",
            None,
            "The checkpoint or the adapter is damaged: download it again.",
        )
