"""Fixtures of every test of the evaluation."""

import pytest
from support.small_models import SmallModels


@pytest.fixture(autouse=True)
def beside_the_models(small_models: SmallModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where the folders of the models are: a bundle knows a local model by the name of its folder."""
    monkeypatch.chdir(small_models.root)
