"""The documentation's commands parse, those of the README run, and the files it names exist."""

import argparse
import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from gircse.calibration import calibrate_command
from gircse.evaluation import bench_command, parity_command
from gircse.export import build_command, export_command
from gircse.runtime import embed_command
from gircse.serving import serve_command, triton_command
from gircse.serving.bulk import bulk_command

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def embed_cpp_parser() -> argparse.ArgumentParser:
    """Return the flags of the C++ command: those of gircse-embed and one more."""
    parser = embed_command.build_parser()
    parser.add_argument("--onnxruntime", help="library of ONNX Runtime")
    return parser


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "gircse-calibrate": calibrate_command.build_parser,
    "gircse-export": export_command.build_parser,
    "gircse-build": build_command.build_parser,
    "gircse-embed": embed_command.build_parser,
    "gircse-embed-cpp": embed_cpp_parser,
    "gircse-parity": parity_command.build_parser,
    "gircse-bench": bench_command.build_parser,
    "gircse-serve": serve_command.build_parser,
    "gircse-bulk": bulk_command.build_parser,
    "gircse-triton": triton_command.build_parser,
}
README_MAX_LINES = 150


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Return the commands of the toolkit in a page; no argument holds a ``#``, a ``|`` or an ``&&``."""
    text = "\n".join(block for language in ("bash", "sh") for block in blocks(page, language))
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.split(r"&&|\|", line.partition("#")[0])]
    return [part.removeprefix(".venv/bin/") for part in parts if "gircse-" in part.split(" ")[0]]


def setup_lines() -> list[str]:
    return [
        line for block in blocks(README, "bash") for line in block.splitlines() if line.startswith("python3 -m venv")
    ]


@pytest.mark.parametrize("command", dict.fromkeys(command for page in PAGES for command in commands(page)))
def test_every_command_parses(command: str) -> None:
    program, *arguments = shlex.split(command)
    PARSERS[program]().parse_args(arguments)


@pytest.mark.parametrize("program", PARSERS)
def test_every_flag_is_explained(program: str) -> None:
    for action in PARSERS[program]()._actions:
        assert action.help, action.option_strings or action.dest


def test_the_page_of_commands_is_current() -> None:
    render = runpy.run_path(str(ROOT / "scripts" / "generate_cli.py"))["render"]
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == render(), "run: python scripts/generate_cli.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_named_file_exists(page: Path) -> None:
    # A path in the repository, such as `runtime/precision.py`; those of bundles and reports have other suffixes.
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|sh|yml|md))`", page.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file(), path


def test_every_named_extra_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [
        extra
        for page in PAGES
        for extras in re.findall(r"""["']\.\[([\w,-]+)\]["']""", page.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    ]
    assert set(named) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_compile(page: Path) -> None:
    for block in blocks(page, "py") + blocks(page, "python"):
        ast.parse(block)


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= README_MAX_LINES


def test_each_machine_is_set_up_by_one_line() -> None:
    export, runtime, tests = setup_lines()
    assert "export]" in export
    assert export.endswith(".venv/bin/gircse-export --steps 8")
    assert '".[cpu]"' in runtime
    assert runtime.endswith("--self-test")
    # .ci/run takes the first line of the README that names this extra, and splits it at the last &&.
    assert next(line for line in README.read_text(encoding="utf-8").splitlines() if "[test]" in line) == tests
    assert tests.rpartition(" && ")[2] == ".venv/bin/pytest"


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path: Path) -> None:
    """Export the demo as the first set-up line does, then run every other ``bash`` block and the Python example."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    export = setup_lines()[0].rpartition(".venv/bin/")[2]
    quickstart = [block for block in blocks(README, "bash") if not block.startswith("python3 -m venv")]
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join([export, *quickstart])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "self-test passed" in done.stdout
    assert (tmp_path / "vectors.npy").exists()
    assert (tmp_path / "vectors.jsonl").exists()
    assert "pass  texts with other token ids 0 <= 0" in done.stdout
    assert (tmp_path / "parity" / "parity.xml").exists()
    (example,) = blocks(README, "python")
    check = "assert every_step.shape == (1, 8, 576) and (queries @ documents.T)[0].argmax() == 0"
    subprocess.run([sys.executable, "-c", f"{example}\n{check}"], cwd=tmp_path, check=True)
