"""Builds the C++ runtime for tests."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "runtime" / "cpp"
BUILD = ROOT / "build" / "cpp-tests"
TOOLS = (os.environ.get("CXX", "c++"), "cmake", "ninja", "pkg-config")


def run(*command: str | Path, **options: Any) -> str:
    """Return what a tool prints to stdout; where it fails, so does the test, with all that the tool said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout


def build_once() -> Path:
    """Build the library, the command and the unit tests with warnings as errors, and return the build folder.

    The folder is kept: the next run builds what has changed. Processes of one run wait for each other.
    """
    if sys.platform != "linux":
        pytest.skip(f"the C++ runtime is tested on Linux, and this is {sys.platform}")
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"no {', '.join(absent)} here: scripts/install_cpp_tools.sh installs what C++ needs")
    BUILD.parent.mkdir(exist_ok=True)
    with (BUILD.parent / "cpp-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            configure(BUILD, "-DGIRCSE_BUILD_TESTS=ON", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON")
        except pytest.fail.Exception as err:
            if "Each download failed" in str(err):
                pytest.skip("a header is not here and cannot be downloaded: scripts/install_cpp_tools.sh installs it")
            raise
        run("cmake", "--build", BUILD, "--parallel", "2")
    return BUILD


def configure(folder: Path, *options: str, sources: Path = SOURCES) -> None:
    run("cmake", "-S", sources, "-B", folder, "-G", "Ninja", *options)
