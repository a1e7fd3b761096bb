"""Fixtures of every test: seeded small models, and the verification material where it is present."""

import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from support.small_models import SmallModels

from gircse.export import exporter

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]  # a damaged file is large, and an export takes a second
settings.register_profile(
    "ci", max_examples=100, deadline=20_000, derandomize=True, database=None, suppress_health_check=_SLOW
)
settings.register_profile("long", settings.get_profile("ci"), max_examples=20_000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

SHARED = Path(os.environ.get("GIRCSE_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session", autouse=True)
def trace_once() -> Iterator[None]:
    """Trace each config once: what is traced depends on nothing else, and takes most of the time of a small export."""
    trace, traced = exporter.trace_decoder, {}

    def trace_decoder(config: Any, shape: Any, *, positions: int) -> Any:
        key = (config.to_json_string(), positions)
        if key not in traced:
            traced[key] = trace(config, shape, positions=positions)
        return traced[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "trace_decoder", trace_decoder)
        yield


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> SmallModels:
    return SmallModels(tmp_path_factory.mktemp("small"))


@pytest.fixture
def small_bundle(small_models: SmallModels, tmp_path: Path) -> Path:
    """A copy of a bundle, for tests that damage it."""
    copy = tmp_path / "bundle"
    shutil.copytree(small_models.bundle("qwen2"), copy)
    return copy


@pytest.fixture
def small_checkpoint(small_models: SmallModels, tmp_path: Path) -> Path:
    """A copy of a checkpoint, for tests that damage it."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(small_models.checkpoint("qwen2"), copy)
    return copy


@functools.cache
def _missing(relative: str) -> bool:
    return not (SHARED / relative).exists()


@pytest.fixture
def golden_directory() -> Path:
    """The official code's vectors; they are not part of the project."""
    if _missing("golden"):
        pytest.skip("the official golden vectors are not here (set GIRCSE_SHARED to the folder that holds golden/)")
    return SHARED / "golden"
