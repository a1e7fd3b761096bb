"""Imports go one way, as ``MAY_IMPORT`` says, and the runtime never sees torch."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_models import SmallModels

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "runtime": {"runtime"},
    "reporting": {"runtime", "reporting"},
    "checkpoint": {"runtime", "checkpoint"},
    "calibration": {"runtime", "reporting", "checkpoint", "calibration"},
    "export": {"runtime", "reporting", "checkpoint", "calibration", "export"},
    "evaluation": {"runtime", "reporting", "checkpoint", "calibration", "evaluation"},
    "serving": {"runtime", "serving"},
}
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "rich",
    "huggingface_hub",
    "scipy",
    "matplotlib",
    "psutil",
}


def imported(path: Path) -> set[str]:
    """Return every module that a file imports anywhere, functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        packages = {name.split(".")[1] for name in imported(path) if name.startswith("gircse.")}
        assert packages <= MAY_IMPORT[package], path


def test_runtime_imports_nothing_heavy() -> None:
    for path in sorted((ROOT / "runtime").rglob("*.py")):
        assert not {name.split(".")[0] for name in imported(path)} & HEAVY, path


def test_runtime_embeds_where_torch_cannot_be_imported(small_models: SmallModels) -> None:
    """In a fresh interpreter that refuses torch and its company, a bundle loads, tests itself and embeds."""
    code = f"""
import sys
for name in {sorted(HEAVY - {"huggingface_hub"})!r}:
    sys.modules[name] = None
from gircse.runtime import Embedder
embedder = Embedder({str(small_models.bundle("qwen2"))!r})
assert embedder.self_test().passed
print(embedder.encode(["no torch here"]).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 48)"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_nothing_shadows_a_library(package: str) -> None:
    """A command file run as a script puts its folder on the path; no name there may be that of a library."""
    libraries = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()}
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    beside_commands = [path for path in (ROOT / package).glob("*.py") if any((ROOT / package).glob("*_command.py"))]
    assert not {path.stem for path in (*folders, *beside_commands)} & libraries


def test_only_command_files_print() -> None:
    for package in MAY_IMPORT:
        for path in sorted((ROOT / package).rglob("*.py")):
            calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            prints = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
            assert not prints or path.stem.endswith("command"), path
