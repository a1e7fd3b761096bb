"""What there is memory for: a layer to compute with, then one to read ahead, then the rest."""

import dataclasses
from types import SimpleNamespace

import psutil
import pytest
from support.small_models import SmallModels

from gircse.checkpoint import reference_choice
from gircse.checkpoint.model_config import read_model_config
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.reference_choice import BASE_BYTES, FREE_SHARE, ReferenceBudget, ReferenceOptions
from gircse.checkpoint.source import resolve_checkpoint

GIB = 1 << 30
CPU = ReferenceBudget(
    memory=0,
    device=None,
    whole=36 * GIB,
    whole_on_device=30 * GIB,
    layer=GIB,
    vocabulary=4 * GIB,
    streamed=3 * GIB,
    streamed_on_device=2 * GIB,
)


@pytest.mark.parametrize(
    ("memory", "reads_ahead", "spare"), [(3, False, 0), (3.5, False, 0.5), (4, True, 0), (6, True, 2)]
)
def test_a_layer_is_read_ahead_where_there_is_memory_for_it(memory: float, reads_ahead: bool, spare: float) -> None:
    budget = dataclasses.replace(CPU, memory=int(memory * GIB))
    assert (budget.shortage, budget.reads_ahead, budget.spare) == (None, reads_ahead, spare * GIB)


def test_on_a_gpu_a_layer_is_always_read_ahead() -> None:
    budget = dataclasses.replace(CPU, memory=3 * GIB, device=5 * GIB)
    assert (budget.shortage, budget.reads_ahead, budget.spare) == (None, True, 3 * GIB)


@pytest.mark.parametrize(
    ("memory", "device", "shortage"),
    [
        (2, None, "needs 3.0 GiB of memory with one layer at a time, 2.0 GiB are there for it"),
        (2, 9, "needs 3.0 GiB of memory with one layer at a time, 2.0 GiB are there for it"),
        (3, 1, "needs 2.0 GiB of GPU memory with one layer at a time, 1.0 GiB are there for it"),
        (36, None, None),
    ],
)
def test_too_little_memory_is_told_with_both_numbers(memory: int, device: int | None, shortage: str | None) -> None:
    budget = dataclasses.replace(CPU, memory=memory * GIB, device=None if device is None else device * GIB)
    assert budget.shortage == shortage


@pytest.mark.parametrize(("held", "counted"), [(GIB // 2, GIB // 2), (50 * GIB, BASE_BYTES)])
def test_what_torch_takes_already_is_not_asked_for_again(
    small_models: SmallModels, monkeypatch: pytest.MonkeyPatch, held: int, counted: int
) -> None:
    checkpoint = resolve_checkpoint(str(small_models.checkpoint("llama")))
    config = read_model_config(checkpoint.directory)
    monkeypatch.setattr(reference_choice, "available_memory", lambda: 4 * GIB)
    monkeypatch.setattr(psutil.Process, "memory_full_info", lambda _: SimpleNamespace(uss=held))
    weights = ModelWeights.open(checkpoint, config, steps=1)
    found = ReferenceBudget.of(weights, config, ReferenceOptions())
    assert found.memory == int((4 * GIB + counted) * FREE_SHARE)
    assert ReferenceBudget.of(weights, config, ReferenceOptions(memory=GIB)).memory == GIB


def test_variations_hold_the_weights_twice(small_models: SmallModels) -> None:
    checkpoint = resolve_checkpoint(str(small_models.checkpoint("llama")))
    config = read_model_config(checkpoint.directory)
    weights = ModelWeights.open(checkpoint, config, steps=1)
    plain, varied = (
        ReferenceBudget.of(weights, config, ReferenceOptions(), variations=variations) for variations in (False, True)
    )
    model = small_models.load("llama")
    table = model.get_input_embeddings().weight.nbytes
    assert varied.whole - plain.whole == sum(parameter.nbytes for parameter in model.parameters()) + 3 * table
    assert varied.streamed == plain.streamed  # a layer at a time has its copies at a time
