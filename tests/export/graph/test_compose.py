"""The composed graphs: standard ONNX, no larger than they need to be. ``test_vectors.py`` checks what they compute."""

import onnx
import pytest
from support.small_models import SmallModels


@pytest.mark.parametrize("layout", ["unrolled", "stepwise"])
def test_graphs_are_valid_standard_onnx(small_models: SmallModels, layout: str) -> None:
    for path in (small_models.bundle("qwen2", layout=layout) / "fp32").glob("*.onnx"):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]


def test_graph_grows_linearly_with_steps(small_models: SmallModels) -> None:
    sizes = [
        len(onnx.load(small_models.bundle("qwen2", steps=steps) / "fp32/model.onnx").graph.node) for steps in (3, 4, 5)
    ]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0
