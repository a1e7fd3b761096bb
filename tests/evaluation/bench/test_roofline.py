"""The bytes of weights that a run reads, counted by hand."""

import pytest
from support.small_models import SmallModels

from gircse.evaluation.bench.roofline import memory_bandwidth, weight_bytes_read
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout


def test_weight_traffic_by_hand(small_models: SmallModels) -> None:
    """Tied: the layers once for the prompt and once a step, the table twice a step, small constants besides."""
    model = small_models.load("llama")
    table = model.get_input_embeddings().weight.nbytes
    layers = sum(parameter.nbytes for parameter in model.parameters()) - table
    stepwise = Bundle.open(small_models.bundle("llama", layout="stepwise"))
    prompt = weight_bytes_read(stepwise, "fp32", steps=0)
    step = weight_bytes_read(stepwise, "fp32", steps=1) - prompt
    rotary = 2 * 128 * 4 * 4  # cos and sin of 128 positions, once or twice a layer
    assert layers <= prompt <= layers + 4 * rotary
    assert layers + 2 * table <= step <= layers + 2 * table + 4 * rotary
    unrolled = Bundle.open(small_models.bundle("llama"))
    total = weight_bytes_read(unrolled, "fp32", layout=Layout.UNROLLED, steps=5)
    assert total == pytest.approx(prompt + 5 * step, rel=0.01)
    assert weight_bytes_read(unrolled, "fp32", steps=0) == prompt


def test_bandwidth_is_plausible() -> None:
    assert 5e8 < memory_bandwidth(1) < 1e12
