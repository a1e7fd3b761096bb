"""The workflow for users' own CI: it parses, and its commands run."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.small_models import SmallModels, scale_weights

WORKFLOW = Path(__file__).parents[1] / "examples" / "ci" / "gircse-parity.yml"


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Any]]:
    (job,) = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"].values()
    return {step.get("name", step.get("uses")): step for step in job["steps"]}


def run(command: str, directory: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | variables
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", command], cwd=directory, env=environment, capture_output=True, text=True
    )


def test_export_gate_and_report(small_models: SmallModels, steps: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(small_models.checkpoint("llama"), tmp_path / "model"))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))  # for 512 tokens
    done = run(steps["Export"]["run"], tmp_path, MODEL="./model", ADAPTER="none")
    assert done.returncode == 0, done.stderr
    done = run(steps["Gate"]["run"], tmp_path)
    assert done.returncode == 0, done.stderr
    report = tmp_path / steps["Keep the report"]["with"]["path"]
    assert (report / "parity.xml").is_file()
    assert "FAIL" not in done.stdout

    scale_weights(tmp_path / "bundle", 0.0, 1.0, 1.05)
    shutil.rmtree(report)
    assert run(steps["Gate"]["run"], tmp_path).returncode == 1
    assert (report / "parity.xml").is_file()  # uploaded whatever the verdict
    assert steps["Keep the report"]["if"] == "always()"


def test_install_names_real_extras(steps: dict[str, dict[str, Any]]) -> None:
    project = tomllib.loads((WORKFLOW.parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (named,) = [part for part in steps["Install"]["run"].split('"') if part.startswith(project["name"])]
    extras = named.partition("[")[2].partition("]")[0].split(",")
    assert set(extras) == {"cpu", "demo", "evaluation", "export"} <= set(project["optional-dependencies"])
