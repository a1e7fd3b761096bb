"""Clients that others wrote, against a server on this machine, and the examples of the documentation."""

import base64
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.serving import running_server

from gircse.runtime import Embedder
from gircse.serving.http_app import ServerOptions, create_app

TEXTS = ["how do I reset the card", "the small bird sings", ""]


@pytest.fixture(scope="module")
def address(embedder: Embedder) -> Iterator[str]:
    with running_server(create_app(embedder, ServerOptions(model="small", api_keys=("secret",)))) as address:
        yield address


def test_openai(address: str, embedder: Embedder) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
    expected = embedder.encode(TEXTS)
    for more in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client.embeddings.create(model="small", input=TEXTS, **more)
        vectors: Any = [item.embedding for item in answer.data]
        if more.get("encoding_format") == "base64":
            vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
    answer = client.embeddings.create(model="small", input=TEXTS, extra_body={"input_type": "query", "steps": 2})
    queries = embedder.encode(TEXTS, prompt_name="query", steps=2)
    np.testing.assert_allclose([item.embedding for item in answer.data], queries, atol=1e-5)
    assert [model.id for model in client.models.list()] == ["small"]
    with pytest.raises(openai.NotFoundError, match="the model here is small"):
        client.embeddings.create(model="text-embedding-3-small", input=TEXTS)
    with pytest.raises(openai.BadRequestError, match="steps is 9"):
        client.embeddings.create(model="small", input=TEXTS, extra_body={"steps": 9})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="other").embeddings.create(model="small", input=TEXTS)


def test_langchain(address: str, embedder: Embedder) -> None:
    langchain = pytest.importorskip("langchain_openai")
    arguments = {"model": "small", "base_url": f"{address}/v1", "api_key": "secret"}
    embeddings = langchain.OpenAIEmbeddings(**arguments, check_embedding_ctx_length=False)
    np.testing.assert_allclose(embeddings.embed_documents(TEXTS), embedder.encode(TEXTS), atol=1e-6)


def test_llama_index(address: str, embedder: Embedder) -> None:
    like = pytest.importorskip("llama_index.embeddings.openai_like")
    embeddings = like.OpenAILikeEmbedding(model_name="small", api_base=f"{address}/v1", api_key="secret")
    np.testing.assert_allclose(embeddings.get_text_embedding_batch(TEXTS[:2]), embedder.encode(TEXTS[:2]), atol=1e-6)


@pytest.mark.parametrize("language", ["py", "sh"])
def test_the_examples_of_the_documentation(language: str, embedder: Embedder) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (example,) = (block for block in blocks if ":8080/v1" in block)
    with running_server(create_app(embedder, ServerOptions(model="small"))) as address:
        example = example.replace("http://127.0.0.1:8080", address).replace("gircse-demo-8", "small")
        if language == "py":
            pytest.importorskip("openai")
            exec(example, {})
        else:
            done = subprocess.run(["bash", "-c", example], capture_output=True, text=True, check=True)
            assert len(json.loads(done.stdout)["data"]) == 2
