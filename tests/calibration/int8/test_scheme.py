"""Every projection of a decoder reads exactly one quantized input."""

from collections import Counter

from support.small_models import SmallModels
from torch import nn

from gircse.calibration.int8.scheme import InputKind, decoder_inputs


def test_every_linear_layer_reads_one_input(small_models: SmallModels) -> None:
    linear = {name for name, module in small_models.load("qwen3").named_modules() if isinstance(module, nn.Linear)}
    read = Counter(name for one in decoder_inputs(2) for name in one.projections)
    assert set(read) == linear
    assert set(read.values()) == {1}


def test_the_vocabulary_comes_last() -> None:
    inputs = decoder_inputs(3)
    assert [one.kind for one in inputs] == [*list(InputKind)[:4] * 3, InputKind.VOCABULARY]
    assert len({one.name for one in inputs}) == 13
