"""ONNX Runtime sessions by themselves."""

import numpy as np
import onnxruntime
import pytest
from support.int8_bundles import int8_bundle
from support.small_models import SmallModels
from support.tolerances import SMALL_MODEL_MAX_DIFFERENCE

from gircse.runtime import OptionError, ProviderError
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.ort_session import StepwiseSession, load_graph, open_session


def test_the_cpu_runs_without_a_binding_and_gets_the_same_bits(small_models: SmallModels) -> None:
    """A binding for each of the many cache tensors costs more; it stays the way of a GPU, and is as good here."""

    class Bound(StepwiseSession):
        _run_on_cpu = StepwiseSession._run_on_device

    bundle = Bundle.open(small_models.bundle("llama", precisions=("fp32", "fp16")))
    facts = bundle.manifest.graph
    draw = np.random.default_rng(0)
    input_ids = draw.integers(1, facts.vocab_size, (3, 12))
    mask = np.tril(np.ones((12, 12), np.int64))[[11, 4, 0], ::-1]  # left padding
    for precision in bundle.manifest.variants:
        graph = load_graph(bundle.graph(precision, Layout.STEPWISE), threads=1)
        for steps in (0, 1, facts.steps):
            ours, theirs = (kind(graph, facts).run(input_ids, mask, steps=steps) for kind in (StepwiseSession, Bound))
            np.testing.assert_array_equal(ours.prompt_embedding, theirs.prompt_embedding)
            np.testing.assert_array_equal(ours.step_embeddings, theirs.step_embeddings)


@pytest.mark.parametrize("layout", Layout)
def test_a_closed_session_says_so(small_models: SmallModels, layout: Layout) -> None:
    session = open_session(Bundle.open(small_models.bundle("qwen2")), "fp32", layout=layout, threads=1)
    ids = np.ones((1, 3), np.int64)
    assert session.run(ids, ids, steps=1).prompt_embedding.shape == (1, 48)
    session.close()
    session.close()
    with pytest.raises(OptionError, match=r"^session is closed\. Open the bundle again\.$"):
        session.run(ids, ids, steps=1)


@pytest.mark.parametrize("layout", Layout)
def test_what_fails_in_a_run_is_an_error_of_ours(small_models: SmallModels, layout: Layout) -> None:
    session = open_session(Bundle.open(small_models.bundle("qwen2")), "fp32", layout=layout, threads=1)
    ids = np.full((2, 3), 10**6)  # outside the vocabulary
    with pytest.raises(ProviderError, match=r"^ONNX Runtime failed in a batch of 2 texts of 3 tokens: .* out of data"):
        session.run(ids, np.ones_like(ids), steps=1)


def test_weights_in_int8_are_multiplied_in_float(small_models: SmallModels) -> None:
    """By default ONNX Runtime fuses such a product into one that rounds the activations to 8 bits too."""
    bundle = Bundle.open(int8_bundle(small_models, "llama"))
    path = bundle.graph("int8-weights", Layout.STEPWISE)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    unfused = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ids = np.arange(1, 13)[None]
    found, expected = (
        StepwiseSession(graph, bundle.manifest.graph).run(ids, np.ones_like(ids), steps=0).prompt_embedding
        for graph in (load_graph(path, threads=1), unfused)
    )
    assert np.abs(found - expected).max() < SMALL_MODEL_MAX_DIFFERENCE
