"""Which nodes of an exported graph depend on sizes alone, judged by running it."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from support.small_models import SmallModels

from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.tensor_names import SIZE_NODES_KEY

ON_CPU = {
    Layout.UNROLLED: Counter(Squeeze=1, Concat=1),
    Layout.STEPWISE: Counter(Squeeze=2, Sub=1, Mul=1, Concat=1),
}
"""What the CUDA provider of onnxruntime-gpu 1.31.1 leaves to the CPU, whatever the architecture and the precision."""


def inner_values(model: onnx.ModelProto, feed: dict[str, np.ndarray], weights: str) -> dict[str, np.ndarray]:
    """Run a graph whose every inner value is an output."""
    edited = onnx.ModelProto()
    edited.CopyFrom(model)
    names = [name for node in model.graph.node for name in node.output if name]
    declared = {output.name for output in model.graph.output}
    edited.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in declared)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", weights)
    session = onnxruntime.InferenceSession(edited.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, feed), strict=True))


def feed_of(model: onnx.ModelProto, seed: int) -> dict[str, np.ndarray]:
    """Make inputs that have the same sizes for every seed, and other values; the prompts are padded differently."""
    draw = np.random.default_rng(seed)
    sizes = {"batch": 2, "tokens": 7, "total": 9, "soft": 1, "past": 2}
    shapes = {
        value.name: [dim.dim_value or sizes[dim.dim_param] for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    feed = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if "hidden" in shapes:
        feed["attention_mask"] = np.ones(shapes["attention_mask"], np.int64)
        feed["input_ids"] = draw.integers(1, 500, (2, 6))  # and a soft token, behind a past of two
    else:
        feed["input_ids"] = draw.integers(1, 500, shapes["input_ids"])
        feed["attention_mask"] = np.ones(shapes["attention_mask"], np.int64)
    feed["attention_mask"][0, :1] = seed % 2
    return feed


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_values_of_size_nodes_do_not_follow_the_texts(small_models: SmallModels, name: str, layout: Layout) -> None:
    path = Bundle.open(small_models.bundle(name)).graph("fp32", layout)
    model = onnx.load(path, load_external_data=False)
    (listed,) = [entry.value.split(",") for entry in model.metadata_props if entry.key == SIZE_NODES_KEY]
    nodes = {node.name: node for node in model.graph.node}
    one, other = (inner_values(model, feed_of(model, seed), str(path.parent)) for seed in (1, 2))
    for node in listed:
        for output in nodes[node].output:
            np.testing.assert_array_equal(one[output], other[output])
    decoder = [output for name in nodes.keys() - set(listed) if "rms_norm" in name for output in nodes[name].output]
    assert decoder
    assert not any(np.array_equal(one[output], other[output]) for output in decoder)  # the texts do differ
    operators = Counter(nodes[node].op_type for node in listed)
    assert operators >= ON_CPU[layout]
