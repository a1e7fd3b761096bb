"""A small bundle behind HTTP."""

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient
from support.small_models import SmallModels

from gircse.runtime import Embedder
from gircse.serving.http_app import ServerOptions, create_app


@pytest.fixture(scope="session")
def embedder(small_models: SmallModels) -> Iterator[Embedder]:
    with Embedder(small_models.bundle("qwen2", query_instruction="Find the card"), provider="cpu") as embedder:
        yield embedder


@pytest.fixture(scope="session")
def client(embedder: Embedder) -> Iterator[TestClient]:
    with TestClient(create_app(embedder, ServerOptions(model="small"))) as client:
        yield client
