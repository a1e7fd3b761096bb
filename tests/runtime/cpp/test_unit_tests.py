"""The unit tests in C++, also in a sanitizer's build where there is one, with a bundle for those that need one."""

import os
import subprocess
from pathlib import Path

import pytest
from support.cpp_build import ROOT, SOURCES
from support.small_models import SmallModels


@pytest.mark.parametrize("preset", [None, "asan-ubsan", "tsan"])
def test_unit_tests(cpp_build: Path, onnxruntime_library: Path, small_models: SmallModels, preset: str | None) -> None:
    folder = ROOT / "build" / f"cpp-{preset}" if preset else cpp_build
    program = folder / "tests" / "gircse_tests"
    if not program.exists():
        pytest.skip(f"not built: cd runtime/cpp && cmake --preset {preset} && cmake --build --preset {preset}")
    variables = {
        "GIRCSE_TEST_BUNDLE": str(small_models.bundle("qwen2")),
        "GIRCSE_ONNXRUNTIME": str(onnxruntime_library),
        "TSAN_OPTIONS": f"suppressions={SOURCES / 'tests' / 'tsan.supp'}",
    }
    done = subprocess.run([program], env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GIRCSE_TEST_BUNDLE does not name a bundle" not in done.stdout
