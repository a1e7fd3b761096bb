"""Engines that show the values between their layers, built with TensorRT for RTX; only a GPU could open one."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.engine_build import RTX, Build, Refuse, check_engine, contents
from support.small_models import SmallModels

from gircse.export.engine.tensorrt_builder import TensorRtBuilder
from gircse.runtime import tensor_names
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import ExportError
from gircse.runtime.manifest import GraphFacts, Layout
from gircse.runtime.provider import Provider
from gircse.runtime.trt.memory_layout import MemoryLayout

STEPS = 2
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-weights", "int4-weights", "fp8")


@pytest.fixture
def bundle(small_models: SmallModels, tmp_path: Path) -> Path:
    calibration = small_models.calibration("llama", steps=STEPS)
    original = small_models.bundle("llama", steps=STEPS, precisions=PRECISIONS, calibration=calibration)
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def layer_values(facts: GraphFacts) -> list[str]:
    return tensor_names.layer_inputs(facts.num_layers, prompt=True, step=facts.steps > 0)


def tensors(count: int, tensor_at: Any) -> Mapping[str, Any]:
    return {tensor.name: tensor for tensor in (tensor_at(index) for index in range(count))}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_network_has_what_the_probe_binds(rtx: Any, bundle: Path, precision: str) -> None:
    """Names, types and shapes, as ``load_engine`` will compare them; and nobody but the switch reads a value."""
    opened = Bundle.open(bundle)
    facts = opened.manifest.graph
    builder = TensorRtBuilder(rtx, Provider.TENSORRT_RTX)
    builder.parse(opened.engine_graph(precision, Layout.STEPWISE))
    builder.show_values(layer_values(facts))
    network = builder._network
    inputs, outputs = (
        tensors(network.num_inputs, network.get_input),
        tensors(network.num_outputs, network.get_output),
    )
    memory = MemoryLayout(facts, Layout.STEPWISE, 4, layer_outputs=True)
    small, large = (
        (memory.input_shapes(*sizes), memory.output_shapes(*sizes)) for sizes in ((2, 3, 0), (5, 7, facts.steps))
    )
    for found, one, other in zip((inputs, outputs), small, large, strict=True):
        assert set(found) == set(one)
        for name, tensor in found.items():
            assert len(tensor.shape) == len(one[name])
            # What differs between two batches has to be open.
            for size, *sizes in zip(tensor.shape, one[name], other[name], strict=True):
                assert size in ((-1,) if sizes[0] != sizes[1] else (-1, sizes[0])), name
    assert {inputs[name + tensor_names.FORCED].dtype for name in layer_values(facts)} == {rtx.DataType.FLOAT}
    assert {outputs[name].dtype for name in layer_values(facts)} == {rtx.DataType.FLOAT}
    assert inputs[tensor_names.FORCE].dtype == rtx.DataType.BOOL
    computed = {*layer_values(facts), *(f"{name}.low" for name in layer_values(facts))}
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        read = (layer.get_input(index) for index in range(layer.num_inputs))
        if any(tensor is not None and tensor.name in computed for tensor in read):
            assert layer.type in (rtx.LayerType.SELECT, rtx.LayerType.CAST)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_engines(rtx: Any, bundle: Path, build: Build, precision: str) -> None:
    """Beside the plain engine, which stays the one that the runtime takes."""
    plain, plain_path = build(bundle, "--precision", precision, *RTX)
    manifest, path = build(bundle, "--precision", precision, "--layer-outputs", *RTX)
    assert path.name == f"layers-{plain_path.name}"
    assert manifest.request.layer_outputs
    assert not plain.request.layer_outputs
    facts = Bundle.open(bundle).manifest.graph
    memory = MemoryLayout(facts, Layout.STEPWISE, 4, layer_outputs=True)
    for profile in manifest.profiles:
        for step in range(facts.steps + 1):
            shapes = memory.input_shapes(1, 5, step)
            assert all(profile.shapes[name].holds(shape) for name, shape in shapes.items())
        assert set(profile.shapes) == set(shapes)
    check_engine(plain, plain_path, bundle)


def test_an_engine_without_steps(rtx: Any, small_models: SmallModels, tmp_path: Path, build: Build) -> None:
    shutil.copytree(small_models.bundle("llama", steps=0, layout=Layout.STEPWISE), tmp_path / "b")
    manifest, _ = build(tmp_path / "b", "--layer-outputs", *RTX)
    assert "step/soft_token.forced" not in manifest.profiles[0].shapes
    assert "prompt/embeddings.forced" in manifest.profiles[0].shapes


def test_unrolled_engines_show_no_layers(bundle: Path, refuse: Refuse) -> None:
    assert "--layer-outputs is for the stepwise layout; --layout is unrolled" in refuse(
        bundle, "--layout", "unrolled", "--layer-outputs", *RTX
    )
    assert contents(bundle / "engines") == {}


def test_a_graph_without_names_is_refused(rtx: Any, bundle: Path) -> None:
    builder = TensorRtBuilder(rtx, Provider.TENSORRT_RTX)
    builder.parse(Bundle.open(bundle).engine_graph("fp32", Layout.STEPWISE))
    with pytest.raises(ExportError, match=r"has no value decoder/layer\.9; .*Export the bundle again"):
        builder.show_values(["decoder/layer.0", "decoder/layer.9"])
