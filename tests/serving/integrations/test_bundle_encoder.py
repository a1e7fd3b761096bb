"""What the adapters share: paths and open embedders, one session for equal arguments, pickles without a session."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.small_models import SmallModels

from gircse.runtime import BundleError, Embedder, OptionError
from gircse.runtime.bundle import Bundle
from gircse.runtime.ort_session import open_session
from gircse.runtime.provider import Provider
from gircse.serving import integrations
from gircse.serving.integrations.bundle_encoder import BundleEncoder

TEXTS = ["how do I reset the card", "the small bird sings", ""]


@pytest.mark.parametrize("opened", [False, True])
def test_queries_and_documents_carry_their_own_instruction(bundle: Path, embedder: Embedder, opened: bool) -> None:
    encoder = BundleEncoder(embedder if opened else bundle)
    np.testing.assert_array_equal(encoder.queries(TEXTS, None), embedder.encode(TEXTS, instruction="Find the card"))
    np.testing.assert_array_equal(encoder.queries(TEXTS, "Find"), embedder.encode(TEXTS, instruction="Find"))
    np.testing.assert_array_equal(encoder.queries(TEXTS, ""), embedder.encode(TEXTS))
    np.testing.assert_array_equal(encoder.documents(TEXTS, None), embedder.encode(TEXTS))
    np.testing.assert_array_equal(encoder.documents(TEXTS, "Find"), embedder.encode(TEXTS, instruction="Find"))
    assert np.abs(encoder.queries(TEXTS, None) - encoder.documents(TEXTS, None)).max() > 0.01


def test_arguments_reach_the_embedder(bundle: Path, embedder: Embedder) -> None:
    encoder = BundleEncoder(bundle, steps=2, batch_size=1, provider="cpu", layout="stepwise", threads=1)
    np.testing.assert_allclose(encoder.documents(TEXTS, None), embedder.encode(TEXTS, steps=2), atol=1e-5)
    assert encoder.open().arguments == {
        "precision": None,
        "provider": "cpu",
        "layout": "stepwise",
        "threads": 1,
        "streams": 1,
        "verify": True,
        "prefix_cache": None,
    }


def test_encoders_with_equal_arguments_share_a_session(bundle: Path) -> None:
    first = BundleEncoder(bundle, threads=1)
    assert BundleEncoder(bundle, threads=1, steps=2).open() is first.open()
    assert BundleEncoder(bundle, threads=2).open() is not first.open()
    assert BundleEncoder(Path(bundle / "." / "fp32" / ".."), threads=1).open() is first.open()


def test_another_bundle_at_the_same_path_is_opened_again(small_bundle: Path, small_models: SmallModels) -> None:
    first = BundleEncoder(small_bundle)
    first.open()
    digest = first.manifest_sha256()
    shutil.rmtree(small_bundle)
    shutil.copytree(small_models.bundle("llama"), small_bundle)
    second = BundleEncoder(small_bundle)
    assert second.open() is not first.open()
    assert second.open().manifest.graph.architecture == "llama"
    assert second.manifest_sha256() != digest
    with pytest.raises(BundleError, match="was replaced after it was opened"):
        first.manifest_sha256()


def test_a_pickle_holds_path_and_arguments(bundle: Path, embedder: Embedder) -> None:
    for encoder in (BundleEncoder(bundle, steps=2, provider=Provider.CPU), BundleEncoder(embedder, steps=2)):
        encoder.open()
        pickled = pickle.dumps(encoder)
        assert len(pickled) < 1000
        again = pickle.loads(pickled)
        assert again.config() == encoder.config() == json.loads(json.dumps(encoder.config()))
        assert {type(value) for value in again.config().values()} <= {str, int, bool, type(None)}  # also in YAML
        np.testing.assert_array_equal(again.documents(TEXTS, None), embedder.encode(TEXTS, steps=2))


def test_an_embedder_of_an_open_session_cannot_be_written_down(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    with Embedder.from_session(opened, open_session(opened, "fp32", threads=1), precision="fp32") as embedder:
        encoder = BundleEncoder(embedder)
        assert encoder.documents(TEXTS, None).shape == (3, 48)
        with pytest.raises(OptionError, match=r"embedder was made from an open session\. Pass the path"):
            pickle.dumps(encoder)


def test_errors_are_those_of_the_runtime(bundle: Path, embedder: Embedder, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        BundleEncoder(tmp_path / "none").open()
    with pytest.raises(OptionError, match="precision, threads cannot be given with an open embedder"):
        BundleEncoder(embedder, precision="fp32", threads=1)
    for of in (embedder, bundle):
        with pytest.raises(OptionError, match="steps is 9"):
            BundleEncoder(of, steps=9).open()
    with pytest.raises(TypeError, match="unexpected keyword argument 'device'"):
        BundleEncoder(bundle, device="cuda").open()


def test_each_adapter_is_imported_with_its_library_when_asked_for() -> None:
    """In a fresh interpreter without these libraries, and with an extra named for each adapter."""
    libraries = {
        "BERTopicBackend": ("bertopic", "bertopic"),
        "ChromaEmbeddingFunction": ("chromadb", "chroma"),
        "HaystackDocumentEmbedder": ("haystack", "haystack"),
        "HaystackTextEmbedder": ("haystack", "haystack"),
        "LangChainEmbeddings": ("langchain_core", "langchain"),
        "LlamaIndexEmbedding": ("llama_index", "llama-index"),
    }
    assert set(libraries) == set(integrations.__all__)
    code = f"""
import sys
for library, _ in {libraries!r}.values():
    sys.modules[library] = None
from gircse.serving import integrations
for name, (library, extra) in {libraries!r}.items():
    try:
        getattr(integrations, name)
    except ImportError as err:
        assert str(err).startswith(f"{{name}} cannot be imported: "), err
        assert str(err).endswith(f"Install it: pip install 'gircse-deploy[{{extra}}]'"), err
    else:
        raise AssertionError(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        _ = integrations.Other
