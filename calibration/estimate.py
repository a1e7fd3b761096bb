"""How long a calibration will take: what its parts take on this machine, measured on one layer, times the work."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gircse.calibration.int8.fake_quantization import dequantized
from gircse.calibration.int8.gptq import BLOCK_INPUTS, RoundedWeight, round_smoothed
from gircse.calibration.int8.scheme import LIMBS, OUTLIER_CHANNELS, SMOOTHED, QuantizedInput, layer_inputs
from gircse.calibration.int8.smoothing import MIGRATIONS, SAMPLED_OUTPUTS, product_error
from gircse.calibration.int8.thresholds import Method
from gircse.calibration.observe import SAMPLE_ROWS
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.reference import Reference
from gircse.checkpoint.streamed_model import StreamedModel
from gircse.checkpoint.streaming_time import StreamingRates, shortest_seconds
from gircse.checkpoint.tensor_naming import EMBEDDING_TABLE
from gircse.runtime.batch_planner import TokenBatch

HISTOGRAM_SECONDS = 1.2e-8
"""To count one value; numpy does it on one core of any machine."""


@dataclass(frozen=True)
class LayerShapes:
    """Sizes of one decoder layer.

    Attributes:
        inputs: (in, outs) of every quantized input: its width, and the outputs of each projection.
    """

    inputs: tuple[tuple[QuantizedInput, int, tuple[int, ...]], ...]

    @classmethod
    def of(cls, weights: ModelWeights) -> Self:
        """Return the sizes of the first layer; all are alike."""
        found = []
        for one in layer_inputs(0):
            shapes = [weights.shape(f"{name}.weight") or (0, 0) for name in one.projections]
            found.append((one, shapes[0][1], tuple(shape[0] for shape in shapes)))
        return cls(tuple(found))

    @property
    def outputs(self) -> list[int]:
        """Outputs of every projection."""
        return [out for _, _, outs in self.inputs for out in outs]

    @property
    def widths(self) -> int:
        """Width of all quantized inputs together."""
        return sum(width for _, width, _ in self.inputs)

    @property
    def parameters(self) -> int:
        """Elements of the projections."""
        return sum(width * sum(outs) for _, width, outs in self.inputs)

    @property
    def moments(self) -> int:
        """Elements of the blocks of H."""
        return sum(width // BLOCK_INPUTS * BLOCK_INPUTS**2 + (width % BLOCK_INPUTS) ** 2 for _, width, _ in self.inputs)


class CalibrationTime:
    """Estimates in seconds, from measurements that take a few seconds themselves."""

    def __init__(
        self,
        reference: Reference,
        streamed: StreamedModel,
        rates: StreamingRates,
        *,
        steps: int,
    ) -> None:
        """Measure.

        Args:
            reference: makes the soft tokens and measures the sensitivity.
            streamed: runs the sweep over the layers.
            rates: of the model on this machine.
            steps: K.
        """
        self._reference, self._rates, self._steps = reference, rates, steps
        self._layers = streamed.num_layers
        self._shapes = LayerShapes.of(streamed.weights)
        table = streamed.weights.shape(EMBEDDING_TABLE) or (0, 0)
        self._layers_of_table = table[0] * table[1] / max(1, self._shapes.parameters)
        outputs = self._shapes.outputs
        self._few, self._many = min(outputs), max(outputs)
        width = min(BLOCK_INPUTS, self._shapes.inputs[0][1])
        weight = torch.randn(self._many, width, device=streamed.device)
        moments = [torch.eye(width, device=streamed.device)]
        self._width = width
        self._round_few, self._round_many = (
            shortest_seconds(functools.partial(round_smoothed, part, None, (), moments), repeats=2)
            for part in (weight[: self._few], weight)
        )
        rounded = RoundedWeight(
            torch.ones_like(weight, dtype=torch.int8), weight.new_ones(self._many), weight.new_ones(self._many, 0)
        )
        self._dequantize = shortest_seconds(lambda: dequantized(rounded, (), weight.device), repeats=2) / weight.numel()
        inputs, outputs_seen = self._shapes.inputs[0][1], min(SAMPLED_OUTPUTS, self._many)
        rows = torch.randn(2 * SAMPLE_ROWS, inputs, device=streamed.device)
        seen = torch.randn(outputs_seen, inputs, device=streamed.device)
        self._error = shortest_seconds(lambda: _one_error(rows, seen), repeats=2) / seen.numel()

    def soft_tokens(self, batches: Sequence[TokenBatch]) -> float:
        """Return the seconds of the first pass."""
        return self._refine(batches, 1) if self._steps else 0.0

    def layers(self, batches: Sequence[TokenBatch], *, method: Method, smooth: float | None, rounds: bool) -> float:
        """Return the seconds of the sweep over the layers."""
        tokens = sum(batch.input_ids.size + len(batch.rows) * self._steps for batch in batches)
        rates = self._rates
        forward = rates.layer(rows=tokens, batches=len(batches), read=rates.read)
        moments = rates.row * tokens * BLOCK_INPUTS * self._shapes.widths / self._shapes.parameters
        histograms = 0.0
        if method is not Method.MAX:
            histograms = rates.layer(rows=tokens, batches=len(batches), read=0) + (
                HISTOGRAM_SECONDS * tokens * self._shapes.widths
            )
        rounding = self._rounding() if rounds else 0.0
        return self._layers * (forward + moments + histograms + self._smoothing(smooth) + rounding)

    def sensitivity(self, batches: Sequence[TokenBatch], *, parts: int, models: int) -> float:
        """Return the seconds of the sensitivity.

        Args:
            batches: held-out texts.
            parts: number of runs.
            models: how many times over the whole model is quantized in them.
        """
        sweeps = 1 if self._estimated(batches, parts) is None else self._steps + 1
        return self._refine(batches, parts) + (
            models * sweeps * self._dequantize * self._shapes.parameters * self._layers
        )

    def _estimated(self, batches: Sequence[TokenBatch], variations: int) -> float | None:
        return self._reference.estimate_seconds(batches, steps=self._steps, variations=variations)

    def _refine(self, batches: Sequence[TokenBatch], variations: int) -> float:
        streamed = self._estimated(batches, variations)
        return variations * self._refine_whole(batches) if streamed is None else streamed

    def _refine_whole(self, batches: Sequence[TokenBatch]) -> float:
        """Return the seconds of a run of the whole model, whose reading is done."""
        seconds, layer = 0.0, self._rates.layer
        for batch in batches:
            texts = len(batch.rows)
            seconds += self._layers * layer(rows=batch.input_ids.size, batches=1, read=0)
            per_step = self._layers + 2 * self._layers_of_table
            seconds += self._steps * per_step * layer(rows=texts, batches=1, read=0)
        return seconds

    def _smoothing(self, smooth: float | None) -> float:
        """Return the seconds of the search of one layer."""
        elements = 0
        for one, width, outs in self._shapes.inputs:
            candidates = len(MIGRATIONS) if one.kind in SMOOTHED and smooth is None else 1
            candidates *= 2 if OUTLIER_CHANNELS[one.kind] else 1
            elements += candidates * width * min(sum(outs), SAMPLED_OUTPUTS)
        return elements * self._error

    def _rounding(self) -> float:
        """Return the seconds of GPTQ for one layer."""
        slope = (self._round_many - self._round_few) / max(1, self._many - self._few)
        blocks = (
            width / self._width * (self._round_few + slope * (out - self._few))
            for _, width, outs in self._shapes.inputs
            for out in outs
        )
        return sum(blocks)


def _one_error(rows: Tensor, weight: Tensor) -> float:
    scales = rows.new_ones(rows.shape[1])
    return product_error(rows @ weight.T, rows, weight, scales, (), threshold=4.0, limbs=max(LIMBS.values()))
