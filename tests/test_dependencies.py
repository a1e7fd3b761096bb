"""Every extra brings what its commands import: read from the source, so that no installed package can hide a gap."""

import ast
import functools
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# What each command needs as documented, whatever it is asked to do.
COMMANDS = {
    "gircse-embed": ("cpu",),
    "gircse-export": ("cpu", "export", "demo"),
    "gircse-calibrate": ("calibration", "demo"),
    "gircse-build": ("tensorrt",),
    "gircse-parity": ("cpu", "evaluation", "export", "demo", "polygraphy"),
    "gircse-bench": ("cpu", "evaluation", "export", "demo", "llama-cpp"),
    "gircse-serve": ("cpu", "serve"),
    "gircse-bulk": ("bulk", "cpu", "ray"),
    "gircse-triton": (),
}

# What is enough to import a module, and to run what needs no more.
MODULES = {
    "gircse.runtime": (),
    "gircse.runtime.ort_session": ("cpu",),
    "gircse.serving.http_server": ("serve",),
    "gircse.serving.bulk.run": ("bulk", "cpu"),
    "gircse.serving.ray_serve": ("serve", "ray"),
    "gircse.serving.integrations": (),
    "gircse.serving.integrations.bertopic_backend": ("bertopic",),
    "gircse.serving.integrations.chroma_function": ("chroma",),
    "gircse.serving.integrations.haystack_components": ("haystack",),
    "gircse.serving.integrations.langchain_embeddings": ("langchain",),
    "gircse.serving.integrations.llama_index_embedding": ("llama-index",),
    "gircse.runtime.trt.session": ("tensorrt-rtx",),
    "gircse.export.engine.builder": ("tensorrt-rtx",),
    "gircse.evaluation.parity.run": ("cpu", "evaluation"),
    "gircse.evaluation.parity.polygraphy_files": ("cpu", "evaluation"),
    "gircse.evaluation.bench.run": ("cpu", "evaluation"),
    "gircse.evaluation.mteb_encoder": ("cpu", "mteb"),
}

# Distributions that the test environment may lack, by the module that they install.
NOT_INSTALLED = {
    "bertopic": "bertopic",
    "llama_cpp": "llama-cpp-python",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
    "cuda": "cuda-bindings",
}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(extras: tuple[str, ...]) -> set[str]:
    """Return the distributions that an install with these extras asks for by name."""
    names: set[str] = set()
    pending = [
        *PROJECT["dependencies"],
        *(line for extra in extras for line in PROJECT["optional-dependencies"][extra]),
    ]
    for requirement in pending:
        name, inner = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement).groups()
        names |= declared(tuple(inner.split(","))) if name == PROJECT["name"] else {normalized(name)}
    return names


@functools.cache
def distributions() -> dict[str, set[str]]:
    found = {
        module: set(map(normalized, names)) for module, names in importlib.metadata.packages_distributions().items()
    }
    return {module: {normalized(name)} for module, name in NOT_INSTALLED.items()} | found


def source(module: str) -> Path | None:
    path = ROOT / Path(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imports(nodes: Sequence[ast.AST], *, lazy: bool) -> Iterator[str]:
    """Yield what statements import. An import whose failure is handled is none that an extra has to bring."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Try) and any("ImportError" in ast.dump(handler) for handler in node.handlers):
            yield from (name for name in imports(node.body, lazy=lazy) if name.startswith("gircse."))
            yield from imports([*node.orelse, *node.finalbody], lazy=lazy)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from imports(node.orelse, lazy=lazy)
        elif lazy or not isinstance(node, ast.FunctionDef):
            yield from imports(list(ast.iter_child_nodes(node)), lazy=lazy)


def third_party(start: str, *, lazy: bool) -> dict[str, str]:
    """Return every module of others that is reached from one of ours, with the file of ours that imports it.

    Importing a module runs its packages too, but calls none of their functions.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, bool]] = set()
    pending = [(start, lazy)]
    while pending:
        wanted, deep = pending.pop()
        names = [".".join(wanted.split(".")[:end]) for end in range(2, wanted.count(".") + 2)]
        modules = [name for name in names if source(name)]
        for name in modules:
            key = (name, deep and name == modules[-1])
            if key in seen:
                continue
            seen.add(key)
            path = source(name)
            assert path is not None
            for imported in imports(ast.parse(path.read_text(encoding="utf-8")).body, lazy=key[1]):
                if imported.startswith("gircse."):
                    pending.append((imported, key[1]))
                elif (top := imported.partition(".")[0]) not in sys.stdlib_module_names:
                    found.setdefault(top, str(path.relative_to(ROOT)))
    return found


def missing(start: str, extras: tuple[str, ...], *, lazy: bool) -> dict[str, str]:
    available = declared(extras)
    reached = third_party(start, lazy=lazy)
    return {module: file for module, file in reached.items() if not distributions().get(module, {module}) & available}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_finds_all_that_it_can_import(command: str) -> None:
    module = PROJECT["scripts"][command].partition(":")[0]
    assert not missing(module, COMMANDS[command], lazy=True)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_can_be_imported(module: str) -> None:
    assert not missing(module, MODULES[module], lazy=False)


def test_every_command_is_checked() -> None:
    assert set(COMMANDS) == set(PROJECT["scripts"])
    assert set(PROJECT["optional-dependencies"]) - {"gpu", "test", "docs", "triton"} == {
        extra for extras in (*COMMANDS.values(), *MODULES.values()) for extra in extras
    }


def test_a_gap_would_be_seen() -> None:
    """The fault that this file exists for: the export reached scipy, which its extras do not bring."""
    assert missing("gircse.calibration.sensitivity", ("export", "demo"), lazy=True).keys() == {"scipy"}
    assert "torch" in missing("gircse.checkpoint.reference", ("cpu",), lazy=False)
