"""LangChain's own tests of embeddings, and the vectors of the runtime."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from gircse.runtime import BundleError, Embedder
from gircse.serving.integrations import LangChainEmbeddings

TEXTS = ["how do I reset the card", "the small bird sings", ""]


class SmallBundle:
    """What the standard tests make the embeddings from."""

    _bundle: Path

    @pytest.fixture(autouse=True)
    def take_bundle(self, bundle: Path) -> None:
        self._bundle = bundle

    @property
    def embeddings_class(self) -> type[LangChainEmbeddings]:
        return LangChainEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"bundle": self._bundle, "provider": "cpu"}


class TestStandardUnit(SmallBundle, EmbeddingsUnitTests):
    pass


@pytest.mark.anyio
class TestStandardIntegration(SmallBundle, EmbeddingsIntegrationTests):
    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"


def test_vectors_are_those_of_the_runtime(bundle: Path, embedder: Embedder) -> None:
    for embeddings in (LangChainEmbeddings(bundle), LangChainEmbeddings(embedder)):
        for same in (embeddings, pickle.loads(pickle.dumps(embeddings))):
            np.testing.assert_array_equal(np.float32(same.embed_documents(TEXTS)), embedder.encode(TEXTS))
            np.testing.assert_array_equal(np.float32(same.embed_query(TEXTS[0])), embedder.encode_query(TEXTS[0]))
    assert LangChainEmbeddings(bundle).embed_documents([]) == []


def test_instructions_and_steps(bundle: Path, embedder: Embedder) -> None:
    other = LangChainEmbeddings(bundle, query_instruction="Q", document_instruction="D", steps=2)
    wanted = embedder.encode(TEXTS[:1], instruction="D", steps=2)
    np.testing.assert_array_equal(np.float32(other.embed_documents(TEXTS[:1])), wanted)
    np.testing.assert_array_equal(
        np.float32(other.embed_query(TEXTS[0])), embedder.encode(TEXTS[0], instruction="Q", steps=2)
    )
    bare = LangChainEmbeddings(bundle, query_instruction="")
    np.testing.assert_array_equal(np.float32(bare.embed_query(TEXTS[0])), embedder.encode(TEXTS[0]))


def test_a_vector_store_finds_what_the_runtime_finds(bundle: Path, embedder: Embedder) -> None:
    store = InMemoryVectorStore(LangChainEmbeddings(bundle))
    store.add_texts(TEXTS[:2])
    found = store.similarity_search_with_score(TEXTS[0], k=2)
    wanted = embedder.encode_query(TEXTS[:1]) @ embedder.encode_document(TEXTS[:2]).T
    np.testing.assert_allclose([score for _, score in found], sorted(wanted[0], reverse=True), atol=1e-6)


def test_a_bundle_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        LangChainEmbeddings(tmp_path)
