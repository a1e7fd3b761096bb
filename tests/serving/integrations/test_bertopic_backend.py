"""With BERTopic where it is installed; elsewhere with a base class of the same interface."""

import importlib.util
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gircse.runtime import BundleError, Embedder

TEXTS = ["how do I reset the card", "the small bird sings", ""]
INSTALLED = importlib.util.find_spec("bertopic") is not None


@pytest.fixture(scope="module")
def backend_class() -> Any:
    if not INSTALLED:
        backend = types.ModuleType("bertopic.backend")
        backend.BaseEmbedder = type("BaseEmbedder", (), {"__init__": lambda self: None})
        sys.modules |= {"bertopic": types.ModuleType("bertopic"), "bertopic.backend": backend}
    from gircse.serving.integrations import BERTopicBackend

    yield BERTopicBackend
    if not INSTALLED:
        del sys.modules["bertopic"], sys.modules["bertopic.backend"]


def test_vectors_are_those_of_the_runtime(
    backend_class: Any, bundle: Path, embedder: Embedder, capsys: pytest.CaptureFixture[str]
) -> None:
    for backend in (backend_class(bundle, instruction="T", steps=2), backend_class(embedder, instruction="T", steps=2)):
        wanted = embedder.encode(TEXTS, instruction="T", steps=2)
        np.testing.assert_array_equal(backend.embed(np.array(TEXTS)), wanted)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(backend)).embed(TEXTS), wanted)
    np.testing.assert_array_equal(backend_class(bundle).embed(TEXTS), embedder.encode(TEXTS))
    assert capsys.readouterr().err == ""
    backend.embed(TEXTS, verbose=True)
    assert "3/3" in capsys.readouterr().err


def test_a_bundle_that_is_none_is_refused_at_once(backend_class: Any, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        backend_class(tmp_path)


@pytest.mark.skipif(not INSTALLED, reason="BERTopic, with umap and numba (300 MB), is not among the test packages")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::PendingDeprecationWarning")
def test_topics_of_documents(backend_class: Any, bundle: Path, embedder: Embedder, tmp_path: Path) -> None:
    from bertopic import BERTopic
    from bertopic.backend._utils import select_backend
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    backend = backend_class(bundle)
    assert select_backend(backend) is backend
    texts = [f"reset the card {i}" for i in range(10)] + [f"small birds sing in the garden {i}" for i in range(10)]
    model = BERTopic(embedding_model=backend, umap_model=PCA(3), hdbscan_model=KMeans(2, random_state=0))
    topics, _ = model.fit_transform(texts)
    precomputed = BERTopic(umap_model=PCA(3), hdbscan_model=KMeans(2, random_state=0), embedding_model=backend)
    assert precomputed.fit_transform(texts, embeddings=embedder.encode(texts))[0] == topics
    model.save(tmp_path / "topics", serialization="pickle")
    again = BERTopic.load(tmp_path / "topics")
    assert again.transform(["reset the card 3"])[0][0] == topics[3]
