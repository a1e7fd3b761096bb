"""A bundle, and a machine to open it on, for the tests of providers."""

import shutil
from pathlib import Path

import pytest
from support.machine import VARIANTS, Machine
from support.small_models import SmallModels


@pytest.fixture
def bundle(small_models: SmallModels, tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(small_models.bundle("llama", precisions=VARIANTS), copy)
    return copy


@pytest.fixture
def machine(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Made after the export, because torch looks at what is installed."""
    return Machine(monkeypatch)
