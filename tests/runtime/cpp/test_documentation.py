"""The examples of docs/cpp.md compile and run."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.small_models import SmallModels

from gircse.runtime import Embedder

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "cpp.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.usefixtures("find_onnxruntime")
def test_the_ctypes_example_gives_the_vector_of_the_python_runtime(
    small_models: SmallModels, cpp_library: Path, tmp_path: Path
) -> None:
    bundle = small_models.bundle("qwen2")
    script = tmp_path / "example.py"
    script.write_text(block("py"))
    printed = subprocess.run(
        [sys.executable, script, cpp_library, bundle], capture_output=True, text=True, check=True
    ).stdout
    with Embedder(bundle) as embedder:
        expected = embedder.encode("How do I reset my PIN?")[:4]
    np.testing.assert_array_equal(np.array(printed.split(), np.float32), expected)


@pytest.mark.usefixtures("cpp_build")
def test_the_cpp_example_compiles(tmp_path: Path) -> None:
    header, _, body = block("cpp").partition("\n\n")
    program = tmp_path / "example.cpp"
    program.write_text(f"{header}\nint main() {{\n{body}\n}}\n")
    subprocess.run(
        ["c++", "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'runtime' / 'cpp' / 'include'}", program], check=True
    )
