"""Bundles that run on an engine, with a simulated TensorRT."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_tensorrt import tiny_run
from support.machine import MAX_TOKENS, TEXTS, Machine, add_engine

from gircse.runtime import BundleError, Embedder, ProviderError
from gircse.runtime.errors import OptionError
from gircse.runtime.provider import Provider
from gircse.runtime.trt.library import MODULES
from gircse.runtime.trt.session import TensorRtSession


@pytest.mark.parametrize("provider", MODULES)
def test_no_gpu_for_an_engine(machine: Machine, bundle: Path, provider: Provider) -> None:
    machine.install_tensorrt(bundle, provider)
    add_engine(bundle, provider)
    machine.cuda = None
    with pytest.raises(ProviderError, match="0 NVIDIA GPUs are visible"):
        Embedder(bundle, provider=provider)


def expected_vectors(embedder: Embedder, texts: list[str]) -> Any:
    """Run the plain loop, text by text and without padding."""
    facts = embedder.manifest.graph
    rows = []
    for ids in embedder.tokenizer(texts):
        ids = ids or [embedder.manifest.pad_token_id]
        array = np.array([ids], np.int64)
        rows.append(tiny_run(facts, array, np.ones_like(array), steps=facts.steps, cache_type="HALF"))
    return np.concatenate([row.step_embeddings for row in rows])


@pytest.mark.parametrize("provider", MODULES)
def test_engine_end_to_end(machine: Machine, bundle: Path, provider: Provider) -> None:
    """A batch of eight texts runs in parts of three, the most that the profile takes; every row is its own text's."""
    module = machine.install_tensorrt(bundle, provider)
    add_engine(bundle, provider)
    embedder = Embedder(bundle, provider=provider)
    assert (embedder.provider, embedder.precision) == (provider, "fp16")
    expected = expected_vectors(embedder, TEXTS)
    found = embedder.encode(TEXTS, batch_size=32, all_steps=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(np.unique(found[:, -1].round(4), axis=0)) == len(set(TEXTS))
    np.testing.assert_allclose(embedder.encode(TEXTS), expected[:, -1], atol=1e-5)
    np.testing.assert_allclose(embedder.encode(TEXTS, steps=2), expected[:, 1], atol=1e-5)
    np.testing.assert_allclose(embedder.encode(TEXTS[:1], batch_size=1), expected[:1, -1], atol=1e-5)
    assert module.enqueued > 0
    assert machine.onnxruntime.sessions == []  # no graph was loaded next to the engine


def test_engine_is_never_given_more_than_its_profile_takes(
    machine: Machine, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.install_tensorrt(bundle)
    add_engine(bundle)
    embedder = Embedder(bundle, provider="tensorrt")
    expected = embedder.encode(TEXTS)
    run = TensorRtSession.run
    sizes: list[int] = []

    def watched(session: TensorRtSession, input_ids: Any, attention_mask: Any, *, steps: int) -> Any:
        sizes.append(len(input_ids))
        return run(session, input_ids, attention_mask, steps=steps)

    monkeypatch.setattr(TensorRtSession, "run", watched)
    np.testing.assert_array_equal(embedder.encode(TEXTS), expected)
    assert sizes == [3, 3, 2]
    sizes.clear()
    embedder.encode(TEXTS, batch_size=2)
    assert sizes == [2, 2, 2, 2]


def test_prompts_too_long_for_the_engine(machine: Machine, bundle: Path) -> None:
    """They fit the bundle, so they are not cut; the engine's limits and the way out are named."""
    machine.install_tensorrt(bundle)
    add_engine(bundle)
    embedder = Embedder(bundle, provider="tensorrt")
    long = "word after word " * 10
    (ids,) = embedder.tokenizer([long])
    assert MAX_TOKENS < len(ids) <= embedder.manifest.graph.max_tokens
    with pytest.raises(OptionError, match=r"profile throughput takes batch 1\.\.3, tokens 1\.\.20; ") as caught:
        embedder.encode(["short", long])
    assert str(caught.value).startswith(f"input_ids has shape (2, {len(ids)}); ")
    assert "rebuild with larger sizes; it was built by: gircse-build" in str(caught.value)
    assert embedder.encode(["short"]).shape == (1, 48)  # the session goes on


def test_an_engine_needs_the_small_files_but_not_the_weights(machine: Machine, bundle: Path) -> None:
    machine.install_tensorrt(bundle)
    add_engine(bundle)

    def flip(name: str) -> None:
        content = bytearray((bundle / name).read_bytes())
        content[len(content) // 2] ^= 1
        (bundle / name).write_bytes(content)

    flip("fp16/weights.bin")
    assert Embedder(bundle, provider="tensorrt").encode(["a"]).shape == (1, 48)
    flip("golden.safetensors")
    with pytest.raises(BundleError, match=r"golden\.safetensors.* SHA-256"):
        Embedder(bundle, provider="tensorrt")
    assert Embedder(bundle, provider="tensorrt", verify=False).encode(["a"]).shape == (1, 48)


def test_engine_of_a_layout_that_was_not_built(machine: Machine, bundle: Path) -> None:
    machine.install_tensorrt(bundle)
    add_engine(bundle)
    with pytest.raises(ProviderError, match=r"has no unrolled tensorrt engine of fp16.* --layout unrolled"):
        Embedder(bundle, provider="tensorrt", layout="unrolled")
