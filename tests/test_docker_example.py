"""The image and its compose file: no Docker runs here, but what they name is there and agrees."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from gircse.serving.serve_command import build_parser

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "docker"
IMAGE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ENTRYPOINT = json.loads(re.search(r"^ENTRYPOINT (.*)$", IMAGE, re.MULTILINE)[1])


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))["services"]


def test_the_extras_of_the_image_are_real() -> None:
    extras = re.search(r'"/source\[([\w,-]+)\]"', IMAGE)[1].split(",")
    assert set(extras) == {"cpu", "serve"} <= set(PYPROJECT["project"]["optional-dependencies"])


def test_the_build_sees_every_package() -> None:
    kept = set(re.findall(r"^!(\S+)$", (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    folders = set(PYPROJECT["tool"]["setuptools"]["package-dir"].values())
    assert kept == folders | {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}


def test_the_flags_are_those_of_the_command(services: dict[str, Any]) -> None:
    command, *flags = ENTRYPOINT
    assert command in PYPROJECT["project"]["scripts"]
    args = build_parser().parse_args([*flags, *services["gircse"]["command"]])
    assert args.host == "0.0.0.0"
    (mount,) = services["gircse"]["volumes"]
    assert mount.endswith(f":{args.bundle}:ro")


def test_the_port_is_one(services: dict[str, Any]) -> None:
    port = build_parser().parse_args(ENTRYPOINT[1:]).port
    assert re.findall(r"^EXPOSE (\d+)$", IMAGE, re.MULTILINE) == [str(port)]
    assert f"http://127.0.0.1:{port}/health" in IMAGE
    assert services["gircse"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    prometheus = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    (scraped,) = prometheus["scrape_configs"]
    (targets,) = scraped["static_configs"]
    assert targets == {"targets": [f"gircse:{port}"]}
    assert scraped.get("metrics_path", "/metrics") == "/metrics"  # a route of the server


def test_the_files_that_are_named_are_there(services: dict[str, Any]) -> None:
    build = services["gircse"]["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).samefile(FOLDER / "Dockerfile")
    configuration = services["prometheus"]["volumes"][0].split(":")[0]
    assert (FOLDER / configuration).is_file()
