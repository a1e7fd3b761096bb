"""Weight sources: what they say that they make is what they make, and the integers mean the weight."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from gircse.calibration.int8.rounding import WeightGrid
from gircse.export.int8.weights import QuantizedEmbedding, QuantizedProduct, SmoothedNorm, WeightSource

INPUTS, OUTPUTS = 32, 12


def checkpoint() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    made = {name: torch.randn(OUTPUTS, INPUTS, generator=generator) for name in ("q", "k")}
    return {**made, "norm": torch.rand(INPUTS, generator=generator) + 0.5}


def read(name: str) -> Iterator[Tensor]:
    """Yield blocks of five rows."""
    yield from checkpoint()[name].split(5)


SMOOTHING = torch.linspace(0.5, 2.0, INPUTS)
SOURCES: tuple[WeightSource, ...] = (
    SmoothedNorm("norm", SMOOTHING),
    QuantizedProduct("both", {"q": (OUTPUTS, INPUTS), "k": (OUTPUTS, INPUTS)}, SMOOTHING, (3, 7)),
    QuantizedProduct("plain", {"q": (OUTPUTS, INPUTS)}),
    QuantizedProduct("blocks", {"q": (OUTPUTS, INPUTS), "k": (OUTPUTS, INPUTS)}, grid=WeightGrid(4, 16)),
    QuantizedEmbedding("table", "q", (OUTPUTS, INPUTS)),
)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
def test_makes_what_it_declares(source: WeightSource) -> None:
    made = source.tensors(read)
    assert {name: (tuple(tensor.shape), tensor.numpy().dtype) for name, tensor in made.items()} == {
        name: (spec.shape, np.int8 if name.endswith(".int4") else spec.dtype.numpy())
        for name, spec in source.initializers.items()
    }
    assert source.reads == {name: tuple(checkpoint()[name].shape) for name in source.reads}


def test_smoothing_and_its_product_cancel() -> None:
    """(x / s) @ (s W) with the outlier channels in float is x @ W, but for the rounding."""
    source = SOURCES[1]
    assert isinstance(source, QuantizedProduct)
    made = {name: tensor.numpy() for name, tensor in source.tensors(read).items()}
    x = np.random.default_rng(1).normal(size=(20, INPUTS)).astype(np.float32)
    smoothed = x / SMOOTHING.numpy()
    ours = smoothed @ (made[source.weight_name] * made[source.scale_name])
    ours += smoothed[:, [3, 7]] @ made[source.outlier_name]
    exact = x @ torch.cat([checkpoint()["q"], checkpoint()["k"]]).T.numpy()
    assert np.abs(ours - exact).max() / np.abs(exact).max() < 0.02
    assert not made[source.weight_name][[3, 7]].any()


def test_an_embedding_row_is_within_half_a_step() -> None:
    made = SOURCES[4].tensors(read)
    integers, scales = made["table.int8"].numpy(), made["table.scale"].numpy()[:, None]
    assert (np.abs(integers * scales - checkpoint()["q"].numpy()) <= scales * 0.501).all()


def test_a_block_of_four_bits_holds_its_largest_weight() -> None:
    source = SOURCES[3]
    assert isinstance(source, QuantizedProduct)
    assert source.initializers["blocks.int4"].dtype is ir.DataType.INT4
    made = source.tensors(read)
    integers, scales = made["blocks.int4"], made["blocks.scale"].repeat_interleave(16, dim=0)
    exact = torch.cat([checkpoint()["q"], checkpoint()["k"]]).T
    assert integers.abs().max() == 7
    assert ((integers * scales - exact).abs() <= scales * 0.501).all()
