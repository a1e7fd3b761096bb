import asyncio
import pickle
from pathlib import Path

import numpy as np
import pytest
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from support.tolerances import BATCH_MAX_DIFFERENCE

from gircse.runtime import BundleError, Embedder, OptionError
from gircse.serving.integrations import LlamaIndexEmbedding

TEXTS = ["how do I reset the card", "the small bird sings", "about old ships", "a storm"]


@pytest.mark.parametrize("opened", [False, True])
def test_vectors_are_those_of_the_runtime(bundle: Path, embedder: Embedder, opened: bool) -> None:
    embedding = LlamaIndexEmbedding(embedder if opened else bundle)
    queries, documents = embedder.encode_query(TEXTS[:1]), embedder.encode(TEXTS)
    np.testing.assert_array_equal(np.float32([embedding.get_query_embedding(TEXTS[0])]), queries)
    np.testing.assert_array_equal(np.float32(embedding.get_text_embedding(TEXTS[0])), embedder.encode(TEXTS[0]))
    np.testing.assert_array_equal(np.float32(embedding.get_text_embedding_batch(TEXTS)), documents)

    async def asynchronous() -> list[object]:
        return [
            await embedding.aget_query_embedding(TEXTS[0]),
            await embedding.aget_text_embedding(TEXTS[0]),
            await embedding.aget_text_embedding_batch(TEXTS),
        ]

    query, text, batch = asyncio.run(asynchronous())
    np.testing.assert_array_equal(np.float32([query]), queries)
    np.testing.assert_array_equal(np.float32(text), embedder.encode(TEXTS[0]))
    np.testing.assert_array_equal(np.float32(batch), documents)


def test_batches_instructions_and_steps(bundle: Path, embedder: Embedder) -> None:
    embedding = LlamaIndexEmbedding(bundle, query_instruction="Q", text_instruction="D", steps=2, embed_batch_size=3)
    texts = np.float32(embedding.get_text_embedding_batch(TEXTS))
    assert np.abs(texts - embedder.encode(TEXTS, instruction="D", steps=2)).max() < BATCH_MAX_DIFFERENCE
    texts = np.float32(asyncio.run(embedding.aget_text_embedding_batch(TEXTS)))
    assert np.abs(texts - embedder.encode(TEXTS, instruction="D", steps=2)).max() < BATCH_MAX_DIFFERENCE
    np.testing.assert_array_equal(
        np.float32(embedding.get_query_embedding(TEXTS[0])), embedder.encode(TEXTS[0], instruction="Q", steps=2)
    )


def test_what_is_written_makes_it_again(bundle: Path, embedder: Embedder) -> None:
    embedding = LlamaIndexEmbedding(
        bundle, query_instruction="Q", text_instruction="D", steps=2, threads=1, embed_batch_size=7, layout="stepwise"
    )
    data = embedding.to_dict()
    assert (data["bundle"], data["threads"], data["layout"]) == (str(bundle), 1, "stepwise")
    for again in (
        LlamaIndexEmbedding.from_dict(data),
        LlamaIndexEmbedding.from_json(embedding.to_json()),
        pickle.loads(pickle.dumps(embedding)),
    ):
        assert again.to_dict() == data
        np.testing.assert_array_equal(again.get_text_embedding_batch(TEXTS), embedding.get_text_embedding_batch(TEXTS))
    assert LlamaIndexEmbedding(embedder).to_dict()["bundle"] == embedder.path


def test_the_cache_of_a_pipeline_knows_another_bundle_at_the_same_path(small_bundle: Path, embedder: Embedder) -> None:
    nodes = [TextNode(text=text) for text in TEXTS]
    pipeline = IngestionPipeline(transformations=[LlamaIndexEmbedding(small_bundle)])
    first = pipeline.run(nodes=nodes)
    np.testing.assert_array_equal(np.float32([node.embedding for node in first]), embedder.encode(TEXTS))
    before = LlamaIndexEmbedding(small_bundle).to_dict()
    manifest = small_bundle / "gircse.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    after = LlamaIndexEmbedding(small_bundle).to_dict()
    assert {key for key in before if before[key] != after[key]} == {"manifest_sha256"}


def test_a_cache_by_text_alone_is_refused(bundle: Path) -> None:
    with pytest.raises(OptionError, match=r"embeddings_cache is given; .* a query could get the vector of a document"):
        LlamaIndexEmbedding(bundle, embeddings_cache=SimpleKVStore())


def test_a_bundle_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        LlamaIndexEmbedding(tmp_path)
