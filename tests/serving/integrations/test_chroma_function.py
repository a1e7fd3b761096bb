import json
import shutil
import subprocess
import sys
from pathlib import Path

import chromadb
import numpy as np
import pytest
from chromadb.utils.embedding_functions import known_embedding_functions
from support.small_models import SmallModels

from gircse.runtime import BundleError, Embedder, OptionError
from gircse.serving.integrations import ChromaEmbeddingFunction

TEXTS = ["how do I reset the card", "the small bird sings"]

# Opens a collection by its name alone, adds a document and asks for one; the bundle may be opened once.
REOPEN = """
import json, sys
import chromadb
from gircse.serving.integrations import ChromaEmbeddingFunction, bundle_encoder

class Counted(bundle_encoder.Embedder):
    opened = 0

    def __init__(self, *given, **arguments):
        Counted.opened += 1
        super().__init__(*given, **arguments)

bundle_encoder.Embedder = Counted
collection = chromadb.PersistentClient(sys.argv[1]).get_collection("faq")
collection.add(ids=["2"], documents=[sys.argv[2]])
found = collection.query(query_texts=[sys.argv[2]], n_results=3, include=["distances"])
stored = collection.get(ids=["0", "1", "2"], include=["embeddings"])
print(json.dumps([Counted.opened, found["ids"], found["distances"], stored["embeddings"].tolist()]))
"""


@pytest.mark.parametrize("opened", [False, True])
def test_vectors_are_those_of_the_runtime(bundle: Path, embedder: Embedder, opened: bool) -> None:
    of = embedder if opened else bundle
    function = ChromaEmbeddingFunction(of)
    np.testing.assert_array_equal(function(TEXTS), embedder.encode(TEXTS))
    np.testing.assert_array_equal(function.embed_query(TEXTS), embedder.encode_query(TEXTS))
    function = ChromaEmbeddingFunction(of, query_instruction="Q", document_instruction="D", steps=2)
    np.testing.assert_array_equal(function(TEXTS), embedder.encode(TEXTS, instruction="D", steps=2))
    np.testing.assert_array_equal(function.embed_query(TEXTS), embedder.encode(TEXTS, instruction="Q", steps=2))


def test_a_collection_survives_being_reopened_in_another_process(
    bundle: Path, embedder: Embedder, tmp_path: Path
) -> None:
    function = ChromaEmbeddingFunction(bundle, document_instruction="D", steps=2, provider="cpu")
    collection = chromadb.PersistentClient(tmp_path).create_collection("faq", embedding_function=function)
    collection.add(ids=["0", "1"], documents=TEXTS)
    done = subprocess.run(
        [sys.executable, "-c", REOPEN, str(tmp_path), "about old ships"], capture_output=True, text=True, check=True
    )
    opened, found, distances, stored = json.loads(done.stdout)
    assert opened == 1
    documents = embedder.encode([*TEXTS, "about old ships"], instruction="D", steps=2)
    np.testing.assert_allclose(stored, documents, atol=1e-6)
    cosine = 1 - embedder.encode_query(["about old ships"], steps=2) @ documents.T
    assert found == [[str(position) for position in np.argsort(cosine[0])]]
    np.testing.assert_allclose(distances, np.sort(cosine), atol=1e-5)


def test_another_bundle_at_the_path_of_a_collection_is_refused(
    small_bundle: Path, small_models: SmallModels, tmp_path: Path
) -> None:
    client = chromadb.PersistentClient(tmp_path / "store")
    client.create_collection("faq", embedding_function=ChromaEmbeddingFunction(small_bundle))
    shutil.rmtree(small_bundle)
    shutil.copytree(small_models.bundle("llama"), small_bundle)
    with pytest.raises(BundleError, match="is not the bundle that this collection was embedded with"):
        client.get_collection("faq").query(query_texts=TEXTS[:1])
    shutil.rmtree(small_bundle)
    with pytest.raises(BundleError, match="is not a bundle"):
        client.get_collection("faq").query(query_texts=TEXTS[:1])


def test_a_configuration_makes_the_function_again_and_opens_nothing(bundle: Path, embedder: Embedder) -> None:
    function = ChromaEmbeddingFunction(embedder, query_instruction="Q", steps=2)
    config = function.get_config()
    built = known_embedding_functions[function.name()].build_from_config(json.loads(json.dumps(config)))
    assert built.get_config() == config
    np.testing.assert_array_equal(built.embed_query(TEXTS), function.embed_query(TEXTS))
    assert ChromaEmbeddingFunction.build_from_config(config) is built
    ChromaEmbeddingFunction.build_from_config(config | {"bundle": "nowhere"})


def test_what_documents_depend_on_cannot_be_changed(bundle: Path) -> None:
    function = ChromaEmbeddingFunction(bundle)
    old = function.get_config()
    function.validate_config_update(old, ChromaEmbeddingFunction(bundle, query_instruction="Q").get_config())
    for name, value in (("steps", 2), ("document_instruction", "D"), ("manifest_sha256", "0")):
        with pytest.raises(OptionError, match=f"{name} is .* embedded with"):
            function.validate_config_update(old, old | {name: value})


def test_a_bundle_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        ChromaEmbeddingFunction(tmp_path)
