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


def test_what_depends_on_weights_alone_is_computed_once(small_models: SmallModels) -> None:
    """Gemma's norms add 1 to their weights: 13 sums of two layers, however many copies of the decoder there are."""
    graph = onnx.load(small_models.bundle("gemma3") / "fp32/model.onnx", load_external_data=False).graph
    constants = {initializer.name for initializer in graph.initializer}
    assert sum(node.op_type == "Add" and constants.issuperset(node.input) for node in graph.node) == 13


HOST_INPUTS = {"Expand": {1}, "Range": {0, 1, 2}, "Reshape": {1}, "Slice": {1, 2, 3, 4}}
"""The inputs that a GPU's kernel reads from the host."""


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("layout", ["unrolled", "stepwise"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_sizes_stay_on_the_host(small_models: SmallModels, precision: str, layout: str, pooling: str) -> None:
    """A size that meets a tensor of the GPU in one operator is copied there in every run, and holds it up."""
    bundle = small_models.bundle("qwen2", precisions=("fp32", "fp16"), pooling=pooling)
    (path,) = (bundle / precision).glob("stepwise.onnx" if layout == "stepwise" else "model.onnx")
    graph = onnx.load(path).graph
    constants = {initializer.name for initializer in graph.initializer}
    sizes: set[str] = set()
    for node in graph.node:
        found = {index for index, name in enumerate(node.input) if name in sizes}
        tensors = any(name and name not in sizes | constants for name in node.input)
        if node.op_type == "Shape" or (found and not tensors and node.op_type not in HOST_INPUTS):
            sizes.update(node.output)
        elif tensors:
            assert found <= HOST_INPUTS.get(node.op_type, set()), node
    assert sizes
