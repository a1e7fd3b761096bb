from pathlib import Path

import numpy as np
import pytest
from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.core.errors import DeserializationError
from haystack.document_stores.in_memory import InMemoryDocumentStore

from gircse.runtime import BundleError, Embedder
from gircse.serving.integrations import HaystackDocumentEmbedder, HaystackTextEmbedder

TEXTS = ["how do I reset the card", "the small bird sings"]


@pytest.mark.parametrize("opened", [False, True])
def test_vectors_are_those_of_the_runtime(bundle: Path, embedder: Embedder, opened: bool) -> None:
    of = embedder if opened else bundle
    vector = HaystackTextEmbedder(of).run(text=TEXTS[0])["embedding"]
    np.testing.assert_array_equal(np.float32(vector), embedder.encode_query(TEXTS[0]))
    vector = HaystackTextEmbedder(of, instruction="Q", steps=2).run(text=TEXTS[0])["embedding"]
    np.testing.assert_array_equal(np.float32(vector), embedder.encode(TEXTS[0], instruction="Q", steps=2))
    given = [Document(content=text) for text in TEXTS]
    documents = HaystackDocumentEmbedder(of).run(documents=given)["documents"]
    np.testing.assert_array_equal(np.float32([document.embedding for document in documents]), embedder.encode(TEXTS))
    assert [document.content for document in documents] == TEXTS
    assert [document.embedding for document in given] == [None, None]
    documents = HaystackDocumentEmbedder(of, instruction="D", steps=2).run(documents=given)["documents"]
    wanted = embedder.encode(TEXTS, instruction="D", steps=2)
    np.testing.assert_array_equal(np.float32([document.embedding for document in documents]), wanted)
    assert HaystackDocumentEmbedder(of).run(documents=[]) == {"documents": []}


def test_metadata_is_embedded_as_haystack_does(bundle: Path, embedder: Embedder) -> None:
    component = HaystackDocumentEmbedder(
        bundle, meta_fields_to_embed=["title", "none", "year"], embedding_separator=" | "
    )
    given = Document(content=TEXTS[0], meta={"title": "Cards", "none": None, "year": 1999})
    (document,) = component.run(documents=[given])["documents"]
    np.testing.assert_array_equal(np.float32(document.embedding), embedder.encode(f"Cards | 1999 | {TEXTS[0]}"))
    (empty,) = component.run(documents=[Document(content=None)])["documents"]
    np.testing.assert_array_equal(np.float32(empty.embedding), embedder.encode(""))


def test_a_component_opens_the_bundle_when_it_warms_up(bundle: Path, tmp_path: Path) -> None:
    for kind in (HaystackTextEmbedder, HaystackDocumentEmbedder):
        kind(bundle).warm_up()
        component = kind(tmp_path)
        with pytest.raises(BundleError, match="is not a bundle"):
            component.warm_up()


def test_wrong_types_are_refused(bundle: Path) -> None:
    with pytest.raises(TypeError, match="text"):
        HaystackTextEmbedder(bundle).run(text=[Document(content="ok")])
    for wrong in ("ok", ["ok"]):
        with pytest.raises(TypeError, match=r"documents is no list of documents\. Use HaystackTextEmbedder"):
            HaystackDocumentEmbedder(bundle).run(documents=wrong)


def test_a_pipeline_is_written_and_read(bundle: Path, embedder: Embedder) -> None:
    store = InMemoryDocumentStore(embedding_similarity_function="dot_product")
    indexing = Pipeline()
    indexing.add_component("embedder", HaystackDocumentEmbedder(bundle, provider="cpu", meta_fields_to_embed=["title"]))
    indexing.add_component("writer", DocumentWriter(store))
    indexing.connect("embedder.documents", "writer.documents")
    query = Pipeline()
    query.add_component("embedder", HaystackTextEmbedder(embedder, steps=2))
    query.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=2))
    query.connect("embedder.embedding", "retriever.query_embedding")
    with pytest.raises(DeserializationError, match="gircse"):
        Pipeline.loads(indexing.dumps())
    again = Pipeline.loads(indexing.dumps(), allowed_modules=["gircse.*"])
    assert again.to_dict() == indexing.to_dict()
    assert Pipeline.loads(query.dumps(), allowed_modules=["gircse.*"]).to_dict() == query.to_dict()
    indexing.run({"embedder": {"documents": [Document(content=text) for text in TEXTS]}})
    found = query.run({"embedder": {"text": TEXTS[0]}})["retriever"]["documents"]
    wanted = embedder.encode_query(TEXTS[:1], steps=2) @ embedder.encode_document(TEXTS).T
    np.testing.assert_allclose([document.score for document in found], sorted(wanted[0], reverse=True), atol=1e-6)
