"""The libraries that are adapted to stay quiet: they would report every use to their makers."""

import os
from pathlib import Path

import pytest
from support.small_models import SmallModels

os.environ |= {"ANONYMIZED_TELEMETRY": "False", "HAYSTACK_TELEMETRY_ENABLED": "False"}  # read at import

QUERY_INSTRUCTION = "Find the card"


@pytest.fixture(scope="session")
def bundle(small_models: SmallModels) -> Path:
    """The directory that ``embedder`` is opened from."""
    return small_models.bundle("qwen2", query_instruction=QUERY_INSTRUCTION)
