"""The C++ runtime, built once for all tests of a run, and the releases of ONNX Runtime that it is tried with."""

import os
from pathlib import Path

import onnxruntime
import pytest
from support import cpp_build as build


@pytest.fixture(scope="session")
def cpp_build() -> Path:
    """The build folder of the library, the command and the unit tests."""
    return build.build_once()


@pytest.fixture(scope="session")
def cpp_library(cpp_build: Path) -> Path:
    return cpp_build / "libgircse.so"


@pytest.fixture(scope="session")
def cpp_command(cpp_build: Path) -> Path:
    return cpp_build / "command" / "gircse-embed-cpp"


@pytest.fixture(scope="session")
def onnxruntime_library() -> Path:
    """The ONNX Runtime that Python uses."""
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    return library


@pytest.fixture(scope="session")
def oldest_onnxruntime_library() -> Path:
    """The oldest ONNX Runtime that the library supports."""
    path = os.environ.get("GIRCSE_ONNXRUNTIME_OLDEST")
    if path is None:
        pytest.skip("GIRCSE_ONNXRUNTIME_OLDEST does not name the library of the oldest ONNX Runtime, as .ci/run does")
    return Path(path)


@pytest.fixture
def find_onnxruntime(onnxruntime_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let programs that a test starts find ONNX Runtime."""
    monkeypatch.setenv("GIRCSE_ONNXRUNTIME", str(onnxruntime_library))
