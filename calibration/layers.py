"""The second pass of a calibration: one sweep over the decoder layers, everything for a layer while it is loaded.

Every layer runs over all texts, prompts with their soft tokens after them, and its four inputs are observed. Then it is
calibrated: smoothing, thresholds and, where the sensitivity is measured, rounded weights. What was found is saved, the
hidden states go on to the next layer, and the statistics of no layer outlive it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from gircse.calibration.calibration_file import InputCalibration
from gircse.calibration.hidden_states import HiddenStates
from gircse.calibration.int8.fake_quantization import round_weight
from gircse.calibration.int8.gptq import Moments, RoundedWeight
from gircse.calibration.int8.scheme import (
    LIMBS,
    OUTLIER_CHANNELS,
    SMOOTHED,
    VOCABULARY_INPUT,
    QuantizedInput,
    layer_inputs,
)
from gircse.calibration.int8.smoothing import (
    MIGRATIONS,
    Migrations,
    Smoothing,
    output_sample,
    range_without,
    search_smoothing,
)
from gircse.calibration.int8.thresholds import Method, threshold
from gircse.calibration.moments_file import moment_name
from gircse.calibration.observe import BatchRows, InputHistograms, InputStatistics, sample_rows, steps_of_rows, watched
from gircse.calibration.resume import ResumeFolder
from gircse.calibration.soft_tokens import SoftTokens, prompts_and_soft_tokens
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.streamed_model import LayerwiseForward, StreamedModel
from gircse.checkpoint.tensor_naming import LM_HEAD
from gircse.runtime.batch_planner import TokenBatch

InputCalibrations = dict[str, InputCalibration]


@dataclass(frozen=True, kw_only=True)
class Search:
    """How inputs are calibrated.

    Attributes:
        method: how thresholds are chosen.
        smooth: migration strength of every input, or None to search one for each.
        steps: K.
        seed: chooses the sampled rows.
        round_weights: whether rounded weights are needed, which takes most of the time.
    """

    method: Method
    smooth: float | None
    steps: int
    seed: int
    round_weights: bool


class LayerSweep:
    """The texts on their way through the layers."""

    def __init__(
        self, streamed: StreamedModel, batches: Sequence[TokenBatch], soft_tokens: SoftTokens, search: Search
    ) -> None:
        """Embed the texts.

        Args:
            streamed: the model.
            batches: prompts.
            soft_tokens: of the same texts.
            search: how inputs are calibrated.
        """
        self._streamed, self._search = streamed, search
        steps = [steps_of_rows(batch, search.steps) for batch in batches]
        self._places = [places.to(streamed.device) for places in sample_rows(steps, seed=search.seed)]
        self._forwards = [self._begin(batch, soft_tokens.soft_tokens[list(batch.rows)]) for batch in batches]

    def _begin(self, batch: TokenBatch, soft_tokens: Tensor) -> LayerwiseForward:
        ids = torch.from_numpy(batch.input_ids).to(self._streamed.device)
        embeddings = self._streamed.embed(ids)
        return self._streamed.begin(**prompts_and_soft_tokens(batch, embeddings, soft_tokens, self._streamed.device))

    def run(self, folder: ResumeFolder, advance: Callable[[float], None]) -> None:
        """Calibrate the layers that the folder does not have.

        Args:
            folder: takes what is found, see ``read_calibrations``, ``read_rounded`` and ``read_moments``.
            advance: told 1 for every layer.

        Raises:
            CheckpointError: a weight cannot be used, or an activation is NaN or infinite.
            OSError: the folder cannot be written.
        """
        done = finished_layers(folder, self._streamed.num_layers)
        advance(done)
        if done == self._streamed.num_layers:
            return
        shapes = [(*forward.hidden.shape[:2], forward.hidden.shape[2]) for forward in self._forwards]
        # In turns: until a layer is saved, what it read has to stay.
        states = [
            HiddenStates(folder.path / f"states-{number}.bin", shapes, self._streamed.dtype) for number in range(2)
        ]
        for index, forward in enumerate(self._forwards):
            if not done:
                states[0][index].copy_(forward.hidden)
            forward.hidden = states[0][index]  # not in memory
        for layer, name in enumerate(self._streamed.layers(start=done), start=done):
            before, after = states[layer % 2], states[(layer + 1) % 2]
            # No name for the result: it would be held until the next layer has its own.
            folder.save(name, *self._calibrate(layer, functools.partial(self._run_layer, name, before, after)))
            advance(1)

    def _calibrate(self, layer: int, run_layer: Callable[..., None]) -> tuple[dict[str, Tensor], str]:
        """Observe a layer and calibrate its inputs; returns the part for the folder."""
        model, search, inputs = self._streamed.model, self._search, layer_inputs(layer)
        weights = {
            name: model.get_submodule(name).weight.detach().float() for one in inputs for name in one.projections
        }
        statistics = {
            one.name: InputStatistics(
                one.name,
                weights[one.projections[0]].shape[1],
                steps=search.steps,
                moments=True,
                device=self._streamed.device,
            )
            for one in inputs
        }
        run_layer(inputs, statistics)
        smoothings = {
            one.name: smooth_input(one, [weights[name] for name in one.projections], statistics[one.name], search)
            for one in inputs
        }
        histograms = {
            name: InputHistograms(name, smoothing, steps=search.steps) for name, smoothing in smoothings.items()
        }
        if search.method is not Method.MAX:
            run_layer(inputs, histograms)
        calibrations, tensors = {}, {}
        for one in inputs:
            found = statistics[one.name]
            calibration = calibrate_input(smoothings[one.name], found, histograms[one.name], search.method)
            calibrations[one.name] = calibration
            for index, block in enumerate(found.moments or ()):
                tensors[moment_name(one.name, index)] = block
            for name in one.projections if search.round_weights else ():
                rounded = round_weight(weights[name], calibration, found.moments)
                tensors |= {f"{name}.{part}": value for part, value in vars(rounded).items()}
        return tensors, msgspec.json.encode(calibrations).decode()

    def _run_layer(
        self,
        name: str,
        before: HiddenStates,
        after: HiddenStates,
        inputs: Sequence[QuantizedInput],
        observers: Mapping[str, InputStatistics | InputHistograms],
    ) -> None:
        """Run a layer over all texts and let observers see its inputs."""
        for index, (forward, places) in enumerate(zip(self._forwards, self._places, strict=True)):

            def watch(quantized_input: QuantizedInput, rows: Tensor, places: BatchRows = places) -> None:
                observers[quantized_input.name].add(rows, places)

            forward.hidden = before[index].to(self._streamed.device)
            with watched(self._streamed.model, inputs, watch):
                forward.run(name)
            after[index].copy_(forward.hidden)
            forward.hidden = after[index]


def finished_layers(folder: ResumeFolder, layers: int) -> int:
    """Return how many layers, from the first on, a folder has."""
    return next((index for index in range(layers) if folder.facts(f"model.layers.{index}") is None), layers)


def read_calibrations(folder: ResumeFolder, name: str) -> InputCalibrations:
    """Return the calibrations of a layer's inputs."""
    return msgspec.json.decode(folder.facts(name) or "{}", type=InputCalibrations)


def read_rounded(folder: ResumeFolder, projection: str) -> RoundedWeight:
    """Return a rounded weight, such as that of ``model.layers.3.mlp.down_proj``."""
    layer = projection.rsplit(".", 2)[0]
    parts = {part: folder.tensor(layer, f"{projection}.{part}") for part in RoundedWeight.__annotations__}
    return RoundedWeight(**parts)


def read_moments(folder: ResumeFolder, name: str) -> Moments:
    """Return the second moments of an input, such as ``model.layers.3.mlp_output``."""
    layer = name.rpartition(".")[0]
    count = sum(key.rpartition(".")[0] == moment_name(name, 0).rpartition(".")[0] for key in folder.names(layer))
    return [folder.tensor(layer, moment_name(name, index)) for index in range(count)]


def calibrate_vocabulary(weights: ModelWeights, soft_tokens: SoftTokens, search: Search) -> InputCalibration:
    """Calibrate the input of the vocabulary projection, the states that soft tokens are made of.

    The projection itself, GiB of a 7B model, is not read but for the outputs that the error is measured on.
    """
    states = soft_tokens.states.float()
    (places,) = sample_rows([torch.arange(1, search.steps + 1).repeat(len(states))], seed=search.seed)
    rows, name = states.flatten(0, 1), VOCABULARY_INPUT.name
    statistics = InputStatistics(name, rows.shape[1], steps=search.steps, moments=False, device=rows.device)
    statistics.add(rows, places)
    shape = weights.shape(LM_HEAD) or (0,)
    sampled = weights.read_rows(LM_HEAD, output_sample(shape[0]))
    smoothing = smooth_input(VOCABULARY_INPUT, [sampled], statistics, search)
    histograms = InputHistograms(name, smoothing, steps=search.steps)
    if search.method is not Method.MAX:
        histograms.add(rows, places)
    return calibrate_input(smoothing, statistics, histograms, search.method)


def smooth_input(
    quantized_input: QuantizedInput, weights: Sequence[Tensor], statistics: InputStatistics, search: Search
) -> Smoothing:
    """Search the smoothing and the outlier channels of an input that weights (out, in) read."""
    kind = quantized_input.kind
    migrations: Migrations = ()
    if kind in SMOOTHED:
        migrations = MIGRATIONS if search.smooth is None else (search.smooth,)
    return search_smoothing(
        statistics.sampled_rows,
        weights,
        statistics.channel_maxima.amax(0),
        limbs=LIMBS[kind],
        outlier_channels=OUTLIER_CHANNELS[kind],
        migrations=migrations,
    )


def calibrate_input(
    smoothing: Smoothing, statistics: InputStatistics, histograms: InputHistograms, method: Method
) -> InputCalibration:
    """Choose the thresholds of an input in the prompt and at each step."""
    scales, channels = smoothing.scales, smoothing.outlier_channels
    ranges = [range_without(maxima / scales, channels) for maxima in statistics.channel_maxima]
    chosen = ranges if method is Method.MAX else [threshold(histogram, method) for histogram in histograms.steps]
    return InputCalibration(
        smoothing.migration,
        () if bool((scales == 1).all()) else rounded(scales.tolist()),
        channels,
        rounded(ranges),
        rounded(chosen),
        float(f"{smoothing.error**0.5:.4g}"),
    )


def rounded(numbers: Sequence[float]) -> tuple[float, ...]:
    """Round to six digits: more would only make the file longer, INT8 cannot tell them apart."""
    return tuple(float(f"{number:.6g}") for number in numbers)
