"""The estimate counts the work: layers, tokens, steps and runs."""

from typing import Any

import pytest
from support.small_models import SmallModels

from gircse.calibration.estimate import CalibrationTime, LayerShapes
from gircse.calibration.int8.gptq import no_moments
from gircse.calibration.int8.thresholds import Method
from gircse.checkpoint.model_config import read_model_config
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.reference import Reference, WholeReference
from gircse.checkpoint.source import resolve_checkpoint
from gircse.checkpoint.streamed_model import StreamedModel
from gircse.checkpoint.streamed_reference import StreamedReference
from gircse.checkpoint.streaming_time import StreamingRates
from gircse.runtime.batch_planner import pad_batch

STEPS = 3
RATES = StreamingRates(read=100.0, product=0.0, row=10.0, block=0.0, overlap=0.0)
BATCHES = tuple(pad_batch(rows, [[1, 2, 3], [4, 5], [6]], pad_token_id=0) for rows in ((0, 1), (2,)))
TOKENS = 2 * 3 + 1


def calibration_time(small_models: SmallModels, *, streamed: bool) -> CalibrationTime:
    checkpoint = resolve_checkpoint(str(small_models.checkpoint("llama")))
    config = read_model_config(checkpoint.directory)
    model = StreamedModel(config, ModelWeights.open(checkpoint, config, steps=STEPS))
    reference: Reference = WholeReference(small_models.load("llama"))
    if streamed:
        reference = StreamedReference(model, group_bytes=1 << 30)
        reference.__dict__["rates"] = RATES
    return CalibrationTime(reference, model, RATES, steps=STEPS)


def test_a_sweep_reads_every_layer_and_runs_all_tokens(small_models: SmallModels) -> None:
    """What the smoothing and the rounding of these layers take, milliseconds, is nothing beside these rates."""
    time = calibration_time(small_models, streamed=False)
    rows = TOKENS + len("abc") * STEPS
    shapes = LayerShapes.of(ModelWeights.open(*_opened(small_models), steps=STEPS))
    moments = 10 * rows * 512 * shapes.widths / shapes.parameters
    once = time.layers(BATCHES, method=Method.MAX, smooth=None, rounds=False)
    assert once == pytest.approx(2 * (100 + 10 * rows + moments), abs=20)
    again = time.layers(BATCHES, method=Method.MSE, smooth=None, rounds=False)
    assert again - once == pytest.approx(2 * 10 * rows, rel=1e-3)
    assert time.layers(BATCHES, method=Method.MAX, smooth=None, rounds=True) > once


@pytest.mark.parametrize("streamed", [False, True])
def test_runs_of_the_model_are_counted(small_models: SmallModels, streamed: bool) -> None:
    time = calibration_time(small_models, streamed=streamed)
    one = time.soft_tokens(BATCHES)
    layers = 2 * 10 * (TOKENS + len("abc") * STEPS) + (2 * 100 * (STEPS + 1) if streamed else 0)
    assert layers < one < 4 * layers  # and the vocabulary
    many = time.sensitivity(BATCHES, parts=7, models=0)
    assert many == pytest.approx(7 * one, rel=0.01) if not streamed else one < many < 7 * one


def test_sizes_are_those_of_the_model(small_models: SmallModels) -> None:
    shapes = LayerShapes.of(ModelWeights.open(*_opened(small_models), steps=STEPS))
    assert sorted(shapes.outputs) == [16, 16, 48, 48, 48, 80, 80]
    assert shapes.widths == 48 + 48 + 48 + 80
    assert shapes.parameters == 48 * (48 + 16 + 16) + 48 * 48 + 2 * 48 * 80 + 80 * 48
    assert shapes.moments == sum(block.numel() for width in (48, 48, 48, 80) for block in no_moments(width))


def _opened(small_models: SmallModels) -> tuple[Any, Any]:
    checkpoint = resolve_checkpoint(str(small_models.checkpoint("llama")))
    return checkpoint, read_model_config(checkpoint.directory)
