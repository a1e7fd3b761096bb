"""Where the nodes of a graph run, as the C++ runtime is told by the oldest and the newest ONNX Runtime."""

from pathlib import Path

import onnxruntime
import pytest
from support.cpp_build import run
from support.cpp_library import CppLibrary
from support.small_models import SmallModels

from gircse.runtime.node_placement import RECORD_PLACEMENT, nodes_on_cpu


@pytest.fixture(scope="module")
def graph(small_models: SmallModels) -> Path:
    return small_models.bundle("qwen2", layout="stepwise") / "fp32" / "stepwise.onnx"


def listed(build: Path, library: Path, graph: Path) -> dict[str, str]:
    lines = run(build / "tests" / "list_nodes_on_cpu", library, graph).splitlines()
    return dict(line.split("\t") for line in lines)


def test_nodes_are_those_that_python_sees(cpp_build: Path, onnxruntime_library: Path, graph: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*RECORD_PLACEMENT)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    expected = nodes_on_cpu(session)
    assert len(expected) > 50
    assert listed(cpp_build, onnxruntime_library, graph) == expected


def test_the_oldest_release_says_it_too(cpp_build: Path, oldest_onnxruntime_library: Path, graph: Path) -> None:
    found = listed(cpp_build, oldest_onnxruntime_library, graph)
    assert len(found) > 50
    assert {"Attention", "MatMul", "RotaryEmbedding"} <= set(found.values())


def test_nothing_is_said_of_a_session_on_the_cpu(
    cpp_library: Path, onnxruntime_library: Path, small_models: SmallModels
) -> None:
    bundle = small_models.bundle("qwen2", layout="stepwise")
    with CppLibrary(cpp_library).open(bundle, onnxruntime=str(onnxruntime_library)) as embedder:
        assert embedder.description.warning == b""
