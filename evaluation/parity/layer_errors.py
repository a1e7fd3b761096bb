"""Where a graph departs from its reference: the error of every layer, alone and in the running computation.

x_0 is what the first layer reads and x_i what layer i makes of it, x* the same in the reference::

    alone_i    |f_i(x*_(i-1)) - x*_i| / |x*_i - x*_(i-1)|
    running_i  |x_i - x*_i| / |x*_i|

Relative to what a layer adds to the residual stream, rounding costs every layer about the same, however long the stream
is: on the demo the worst layer of FP16 has 4 times the median, of INT8 3 to 5 times, and of FP32 6 times. So what has
more than ``JUMP`` times the median of the layers in its step is named, whatever the precision.
"""

from collections.abc import Sequence

import numpy as np

from gircse.evaluation.parity.layer_trace import LayerTrace
from gircse.evaluation.parity.report_schema import LayerJump, LayerReport
from gircse.runtime.errors import MeasurementError
from gircse.runtime.numerics import Float32

JUMP = 10.0
"""How many times the median of the layers a part's error has to be."""

SMALLEST_JUMP = 1e-4
"""Errors below this never stand out: FP32 sums of large values in another order reach 1e-5."""

SMALLEST_SOFT_TOKEN_JUMP = 1e-2
"""The same for soft tokens: a softmax turns the differences of its logits into relative ones (FP32: 1e-4)."""

SMALLEST_RUNNING = float(np.finfo(np.float32).eps)
"""Running errors below this count as this when their growth is looked for: the first rounding is no growth."""


def compare_layers(
    name: str, text: int, *, reference: LayerTrace, running: LayerTrace, alone: LayerTrace
) -> LayerReport:
    """Compare the traces of one text.

    Args:
        name: of the backend, for errors.
        text: number of the text.
        reference: what is right.
        running: what the graph computes.
        alone: what its parts compute when each is fed what the reference has there.

    Raises:
        MeasurementError: a value is NaN or infinite; names the layer and the step.
    """
    own = np.array([_errors(reference, alone, step, of_update=True) for step in range(len(reference.streams))])
    drift = np.array([_errors(reference, running, step, of_update=False) for step in range(len(reference.streams))])
    for errors in (own, drift):
        if len(bad := np.argwhere(~np.isfinite(errors))):
            step, part = bad[0]
            raise MeasurementError(
                f"{name}, step {step}: {part_name(step, part, layers=own.shape[1] - 2)}",
                f"has NaN or infinity in text {text}",
                None,
                "The precision overflows here, or the weights hold such values: try a wider precision.",
            )
    return LayerReport(text, _rows(own), _rows(drift), tuple(find_jumps(own)))


def find_jumps(alone: Float32) -> list[LayerJump]:
    """Return what stands out among the errors alone, (K + 1, 1 + L + 1), in the order of the computation."""
    layers = alone.shape[1] - 2
    # The lower one of an even number: half of the layers may be faulty.
    median = np.quantile(alone[:, 1:-1], 0.5, axis=1, method="lower")
    floor = np.full_like(alone, SMALLEST_JUMP)
    floor[1:, 0] = SMALLEST_SOFT_TOKEN_JUMP
    found = np.argwhere(alone > np.maximum(JUMP * median[:, None], floor))
    return [
        LayerJump(
            int(step),
            part_name(step, part, layers=layers),
            float(alone[step, part]),
            float(alone[step, part] / max(median[step], np.finfo(np.float32).tiny)),
        )
        for step, part in found
    ]


def part_name(step: int, part: int, *, layers: int) -> str:
    """Return what a column of the errors is called in a step."""
    if part == 0:
        return "soft token" if step else "embeddings"
    return "final norm" if part > layers else f"layer {part - 1}"


def column_of(part: str, *, layers: int) -> int:
    """Return the column of the errors that ``part_name`` calls so."""
    names = [part_name(step, column, layers=layers) for step in (0, 1) for column in range(layers + 2)]
    return names.index(part) % (layers + 2)


def largest_growth(running: Sequence[Sequence[float]]) -> tuple[int, int]:
    """Return step and part that multiply the running error (K + 1, 1 + L + 1) most, along the whole computation.

    A soft token is made of the state of the step before.
    """
    errors = np.array(running)
    flat = np.maximum(errors.ravel(), SMALLEST_RUNNING)
    step, part = np.unravel_index(1 + np.argmax(flat[1:] / flat[:-1]), errors.shape)
    return int(step), int(part)


def _errors(reference: LayerTrace, found: LayerTrace, step: int, *, of_update: bool) -> list[float]:
    """Return the relative error of every part in one step, over all positions of the text."""
    wanted, ours = reference.streams[step], found.streams[step]
    # One layer at a time in FP64: in a 7B, the stream of 512 tokens has 213 MB in FP32 already.
    layers = [
        _relative_error(ours[layer], wanted[layer], before=wanted[layer - 1] if of_update else None)
        for layer in range(1, len(wanted))
    ]
    state = _relative_error(found.states[step], reference.states[step])
    return [_relative_error(ours[0], wanted[0]), *layers, state]


def _relative_error(found: Float32, wanted: Float32, *, before: Float32 | None = None) -> float:
    """Return the norm of the error, over that of the wanted values or of what they add to those before them."""
    exact = wanted.astype(np.float64)
    scale = np.linalg.norm(exact if before is None else exact - before)
    return float(np.linalg.norm(found - exact) / max(scale, np.finfo(np.float32).tiny))


def _rows(errors: Float32) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in errors)
