"""The overflow probe: how large the values of a model become, in the prompt and at every refinement step.

The FP16 maximum is 65504, and decoder LLMs have a few activations thousands of times larger than the rest. The inputs
and outputs of all matrix products are recorded; nothing else in an FP16 graph is larger, except in the rotary
embedding, which can enlarge an element by sqrt(2).
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gircse.checkpoint.reference import refine
from gircse.runtime.errors import CheckpointError
from gircse.runtime.tokenization import TokenBatch

Magnitudes = Mapping[str, NDArray[np.float64]]
"""Tensor name, such as ``model.layers.3.mlp.down_proj output``, to its largest magnitude: (K + 1,), prompt first."""


def largest_magnitudes(model: Any, batches: Iterable[TokenBatch], *, steps: int, temperature: float) -> Magnitudes:
    """Run batches through the reference and record the largest magnitude of every matrix product's input and output.

    Args:
        model: a ``transformers`` causal LM in FP32.
        batches: prompts, padded.
        steps: K.
        temperature: divisor of the logits.

    Returns:
        The magnitudes. The logits have none in the prompt, 0.

    Raises:
        CheckpointError: a value is NaN or infinite even in FP32.
    """
    recorder = _Recorder(steps)
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hooks.callback(module.register_forward_hook(recorder.hook(name)).remove)
        for batch in batches:
            ids, mask = (torch.from_numpy(array).to(model.device) for array in (batch.input_ids, batch.attention_mask))
            recorder.step = 0
            for _ in refine(model, ids, mask, steps=steps, temperature=temperature):
                recorder.step += 1  # what runs before the next state belongs to the next step
    _check_finite(recorder.found)
    return recorder.found


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


class _Recorder:
    """Keeps the maxima of the step that is being computed."""

    def __init__(self, steps: int) -> None:
        self.step = 0
        self.found: dict[str, NDArray[np.float64]] = {}
        self._steps = steps

    def hook(self, name: str) -> Any:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._record(f"{name} input", inputs[0])
            self._record(f"{name} output", output)

        return record

    def _record(self, name: str, value: Tensor) -> None:
        maxima = self.found.setdefault(name, np.zeros(self._steps + 1))
        maxima[self.step] = np.maximum(maxima[self.step], float(value.abs().amax()))
