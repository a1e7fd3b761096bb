"""What only a GPU can show: every provider gives the vectors of PyTorch. Skipped where there is none."""

import threading
from pathlib import Path

import numpy as np
import pytest
from support.small_models import SmallModels
from support.tolerances import GPU_BATCH_MAX_DIFFERENCE, GPU_LAYER_MAX_ERROR, GPU_MIN_COSINE

from gircse.evaluation.parity.batches import side_batches
from gircse.evaluation.parity.engine_probe import open_engine_probe
from gircse.evaluation.parity.graph_probe import ProbedGraph
from gircse.evaluation.parity.layer_errors import compare_layers
from gircse.evaluation.parity.layer_probe import LayerProbe
from gircse.export.engine.builder import BuildOptions, build_engine
from gircse.export.engine.profiles import SizeRange
from gircse.runtime import Embedder, ProviderError
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import row_cosine
from gircse.runtime.provider import Provider
from gircse.runtime.self_test import all_vectors, read_golden_vectors
from gircse.runtime.trt.cuda import open_cuda
from gircse.runtime.trt.library import MODULES

pytestmark = pytest.mark.gpu

TEXTS = ["a", "the harbour freezes over", "one two three four five six seven", "the harbour freezes over"]
PROVIDERS = [provider for provider in Provider if provider not in (Provider.AUTO, Provider.CPU)]


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    try:
        open_cuda()
    except ProviderError as err:
        pytest.skip(f"no GPU: {err}")


def small_bundle(small_models: SmallModels) -> Path:
    return small_models.bundle("llama", precisions=tuple(GPU_MIN_COSINE))


def open_embedder(
    small_models: SmallModels, provider: Provider, precision: str, layout: Layout, *, prefix_cache: bool | None = None
) -> Embedder:
    bundle = small_bundle(small_models)
    try:
        if provider in MODULES:
            build_engine(
                BuildOptions(
                    bundle,
                    precision=precision,
                    provider=provider,
                    layout=layout,
                    batch=SizeRange(1, 2, 3),  # smaller than the batches of the tests
                )
            )
        return Embedder(bundle, provider=provider, precision=precision, layout=layout, prefix_cache=prefix_cache)
    except ProviderError as err:
        pytest.skip(str(err))


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("precision", GPU_MIN_COSINE)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_vectors_are_those_of_pytorch(
    small_models: SmallModels, provider: Provider, precision: str, layout: Layout
) -> None:
    embedder = open_embedder(small_models, provider, precision, layout)
    golden = read_golden_vectors(Bundle.open(small_bundle(small_models)))
    cosines = row_cosine(all_vectors(embedder.run_batch(golden.token_ids)), golden.vectors)
    # FP16 and BF16 up to the second step: untrained models amplify roundings.
    assert cosines[:, : None if precision == "fp32" else 3].min() > GPU_MIN_COSINE[precision]


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_repeated_shapes_threads_and_batches(small_models: SmallModels, provider: Provider, layout: Layout) -> None:
    """Captured graphs, several execution slots and split batches give what the first plain run gave."""
    embedder = open_embedder(small_models, provider, "fp16", layout)
    first = embedder.encode(TEXTS, all_steps=True)
    for _ in range(4):
        assert np.abs(embedder.encode(TEXTS, all_steps=True) - first).max() < GPU_BATCH_MAX_DIFFERENCE
    assert np.abs(embedder.encode(TEXTS, all_steps=True, batch_size=1) - first).max() < GPU_BATCH_MAX_DIFFERENCE
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda at=at: found.update({at: embedder.encode(TEXTS, all_steps=True)}))
        for at in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert max(np.abs(vectors - first).max() for vectors in found.values()) < GPU_BATCH_MAX_DIFFERENCE


@pytest.mark.parametrize("provider", [provider for provider in PROVIDERS if provider is not Provider.ORT_TENSORRT])
def test_a_prefix_gives_the_vectors_of_whole_prompts(
    small_models: SmallModels, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gircse.runtime.prefix_cache.WORTH_TOKENS_GPU", 1)
    embedder = open_embedder(small_models, provider, "fp16", Layout.STEPWISE, prefix_cache=True)
    token_ids, _ = embedder.tokenizer.tokenize(TEXTS, instruction="Find what freezes")
    whole, shared = (
        np.concatenate(
            [all_vectors(outputs) for _, outputs in embedder.run_batches(token_ids, instruction_tokens=common)]
        )
        for common in (None, 8)
    )
    assert embedder.prefix_cache_info().misses == 1
    assert np.abs(shared - whole).max() < GPU_BATCH_MAX_DIFFERENCE


@pytest.mark.parametrize("provider", MODULES)
def test_the_layers_of_an_engine_are_those_of_its_graph(small_models: SmallModels, provider: Provider) -> None:
    """Free, and fed what the graph has there; an input that went to the wrong layer would be off by its whole size."""
    bundle = Bundle.open(small_bundle(small_models))
    try:
        build_engine(BuildOptions(bundle.directory, precision="fp32", provider=provider, layer_outputs=True))
        engine = open_engine_probe(bundle, "fp32", provider)
    except ProviderError as err:
        pytest.skip(str(err))
    (batch,) = side_batches([[5, 300, 44, 44, 260, 9, 101]], bundle.manifest)
    graph = LayerProbe(ProbedGraph(bundle, "fp32", layout=Layout.STEPWISE)).trace(batch)
    running, alone = engine.trace(batch), engine.trace(batch, forced=graph)
    report = compare_layers("engine", 0, reference=graph, running=running, alone=alone)
    assert np.max(report.alone) < GPU_LAYER_MAX_ERROR
    assert np.max(report.running) < GPU_LAYER_MAX_ERROR


def test_auto_takes_the_gpu(small_models: SmallModels) -> None:
    assert Embedder(small_bundle(small_models)).provider is not Provider.CPU
