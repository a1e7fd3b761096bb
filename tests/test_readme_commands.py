"""The README's commands are run, not trusted."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gircse.calibration import calibrate_command
from gircse.evaluation import bench_command, parity_command
from gircse.export import build_command, export_command
from gircse.runtime import embed_command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PARSERS = {
    "gircse-calibrate": calibrate_command._parser,
    "gircse-export": export_command._parser,
    "gircse-build": build_command.build_parser,
    "gircse-embed": embed_command._parser,
    "gircse-parity": parity_command._parser,
    "gircse-bench": bench_command._parser,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line for language in ("bash", "sh") for block in blocks(language) for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r"&&|\|", line.partition("#")[0])]
    return [part.removeprefix(".venv/bin/") for part in parts if "gircse-" in part.split(" ")[0]]


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command: str) -> None:
    program, *arguments = shlex.split(command)
    PARSERS[program]().parse_args(arguments)


@pytest.mark.parametrize("program", [name for name in PARSERS if name != "gircse-embed"])
def test_every_flag_is_explained(program: str) -> None:
    flags = set(re.findall(r"`(--[a-z0-9-]+)", README))
    for action in PARSERS[program]()._actions:
        assert set(action.option_strings) & (flags | {"-h"}) or not action.option_strings, action.option_strings


@pytest.mark.slow
def test_main_commands_run(tmp_path: Path) -> None:
    """Export the demo, then all of "Embed a file", "Use it from Python" and "Prove it", as it stands."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    export = next(command for command in commands() if command.startswith("gircse-export"))
    (embed,) = [block for block in blocks("bash") if "--self-test" in block]
    (parity,) = [block for block in blocks("bash") if "gircse-parity" in block]
    done = subprocess.run(
        ["bash", "-e", "-c", f"{export}\n{embed}\n{parity}"],
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
    (example,) = blocks("python")
    check = "assert every_step.shape == (1, 8, 576) and (queries @ documents.T)[0].argmax() == 0"
    subprocess.run([sys.executable, "-c", f"{example}\n{check}"], cwd=tmp_path, check=True)
