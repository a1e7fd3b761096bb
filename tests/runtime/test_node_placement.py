"""Nodes that a GPU leaves to the CPU are named when a bundle is opened."""

import logging
from pathlib import Path

import onnx
import onnxruntime
import pytest
from support.machine import Machine
from support.small_models import rehash
from support.stub_onnxruntime import CPU, CUDA, TENSORRT, StubOnnxRuntime

from gircse.runtime import Embedder
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.node_placement import RECORD_PLACEMENT, nodes_on_cpu
from gircse.runtime.tensor_names import SIZE_NODES_KEY


def warnings_of(caplog: pytest.LogCaptureFixture, bundle: Path, provider: str) -> list[str]:
    with caplog.at_level(logging.WARNING):
        Embedder(bundle, provider=provider, precision="fp16", layout="stepwise").close()
    return [record.getMessage() for record in caplog.records if "run on the CPU" in record.getMessage()]


@pytest.mark.parametrize("provider", ["cuda", "onnxruntime-tensorrt"])
def test_a_fallback_inside_a_step_is_a_warning_with_the_nodes(
    machine: Machine, bundle: Path, provider: str, caplog: pytest.LogCaptureFixture
) -> None:
    stub = machine.install("onnxruntime", StubOnnxRuntime(TENSORRT, CUDA, CPU))
    stub.left_to_cpu = {"Squeeze", "Sub", "Concat", "RMSNormalization"}
    (warning,) = warnings_of(caplog, bundle, provider)
    assert "fp16/stepwise.onnx: " in warning
    assert "RMSNormalization (decoder/node_rms_norm)" in warning
    assert "more" in warning


def test_one_node_is_enough(machine: Machine, bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    stub = machine.install("onnxruntime", StubOnnxRuntime(CUDA, CPU))
    stub.left_to_cpu = {"GatherND"}
    (warning,) = warnings_of(caplog, bundle, "cuda")
    assert "run on the CPU, which is slow: GatherND (node_GatherND" in warning
    assert "more" not in warning


def test_sizes_computed_on_the_cpu_are_none(machine: Machine, bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Shape, and what is computed from it, of which ONNX Runtime runs some nodes on the CPU for a GPU's sake."""
    stub = machine.install("onnxruntime", StubOnnxRuntime(CUDA, CPU))
    stub.left_to_cpu = {"Shape", "Range", "Less"}
    assert warnings_of(caplog, bundle, "cuda") == []
    assert set(nodes_on_cpu(stub.sessions[-1]).values()) == stub.left_to_cpu


def test_the_cpu_itself_is_not_warned_of(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(caplog, bundle, "cpu") == []


def test_graphs_of_earlier_exports_are_not_judged(
    machine: Machine, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Bundle.open(bundle).graph("fp16", Layout.STEPWISE)
    model = onnx.load(path, load_external_data=False)
    kept = [entry for entry in model.metadata_props if entry.key != SIZE_NODES_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, path)
    rehash(bundle)
    stub = machine.install("onnxruntime", StubOnnxRuntime(CUDA, CPU))
    stub.left_to_cpu = {"MatMul"}
    assert warnings_of(caplog, bundle, "cuda") == []


def test_onnxruntime_says_where_nodes_run(bundle: Path) -> None:
    """The real one, which the stub goes by: nodes keep the names of the graph."""
    path = Bundle.open(bundle).graph("fp32", Layout.STEPWISE)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*RECORD_PLACEMENT)
    found = nodes_on_cpu(onnxruntime.InferenceSession(path, options, providers=[CPU]))
    nodes = [node.name for node in onnx.load(path, load_external_data=False).graph.node]
    assert found["decoder/node_rms_norm"] == "RMSNormalization"
    assert {name for name in nodes if "node_attention" in name} <= found.keys()
