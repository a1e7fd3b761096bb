"""The values between the layers of an engine, simulated by ONNX Runtime, are those of its graph."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.fake_cuda import FakeCuda
from support.graph_engine import GraphTensorRt
from support.small_models import SmallModels

from gircse.evaluation.parity import engine_probe
from gircse.evaluation.parity.backends import BundleBackend
from gircse.evaluation.parity.batches import side_batches
from gircse.evaluation.parity.engine_probe import EngineProbe, has_layer_engine
from gircse.evaluation.parity.graph_probe import ProbedGraph
from gircse.evaluation.parity.layer_probe import LayerProbe
from gircse.evaluation.parity.layer_trace import LayerTrace
from gircse.evaluation.parity.locate import _no_layers
from gircse.export.engine.profiles import ProfileSpec, SizeRange, engine_profiles
from gircse.runtime.batch_planner import TokenBatch
from gircse.runtime.bundle import Bundle, file_sha256
from gircse.runtime.errors import EngineMismatchError, OptionError, ProviderError
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider
from gircse.runtime.trt.engine_manifest import ENGINE_SCHEMA_VERSION, BuildRequest, EngineManifest

STEPS = 2
TEXT = [5, 300, 44, 44, 260, 9, 101]
AddEngine = Callable[..., EngineManifest]


@pytest.fixture
def bundle(small_models: SmallModels, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(small_models.bundle("llama", steps=STEPS), tmp_path / "bundle"))


@pytest.fixture
def batch(bundle: Bundle) -> TokenBatch:
    (batch,) = side_batches([TEXT], bundle.manifest)
    return batch


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A simulated GPU."""
    cuda = FakeCuda()
    monkeypatch.setattr(engine_probe, "open_cuda", lambda: cuda)
    return cuda


@pytest.fixture
def add_engine(bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> AddEngine:
    """Put an engine into the bundle and install the module that runs it."""

    def add(
        provider: Provider = Provider.TENSORRT,
        *,
        layer_outputs: bool = True,
        tokens: SizeRange = SizeRange(1, 8, 16),  # noqa: B008
    ) -> EngineManifest:
        folder = bundle.directory / "engines"
        folder.mkdir(exist_ok=True)
        plan = folder / "layers.plan"
        plan.write_bytes(b"plan")
        specs = [ProfileSpec("all", SizeRange(1, 2, 4), tokens)]
        manifest = EngineManifest(
            schema_version=ENGINE_SCHEMA_VERSION,
            bundle_sha256=file_sha256(bundle.directory / "gircse.json"),
            precision="fp32",
            layout=Layout.STEPWISE,
            provider=provider,
            version="11.1.0",
            compute_capabilities=("8.9",),
            profiles=tuple(
                engine_profiles(
                    specs,
                    bundle.manifest.graph,
                    layout=Layout.STEPWISE,
                    provider=provider,
                    layer_outputs=layer_outputs,
                )
            ),
            request=BuildRequest((1, 2, 4), layer_outputs=layer_outputs),
            settings={},
            build_seconds=1.0,
            plan_bytes=4,
            plan_sha256=file_sha256(plan),
        )
        plan.with_suffix(".json").write_bytes(manifest.to_json())
        module = GraphTensorRt(cuda, bundle, manifest, rtx=provider is Provider.TENSORRT_RTX)
        name = "tensorrt_rtx" if provider is Provider.TENSORRT_RTX else "tensorrt"
        monkeypatch.setitem(sys.modules, name, module)
        return manifest

    return add


def assert_same(found: LayerTrace, expected: LayerTrace) -> None:
    np.testing.assert_array_equal(found.states, expected.states)
    for ours, theirs in zip(found.streams, expected.streams, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("provider", [Provider.TENSORRT, Provider.TENSORRT_RTX])
def test_an_engine_shows_and_takes_the_values_of_its_graph(
    bundle: Bundle, batch: TokenBatch, cuda: FakeCuda, add_engine: AddEngine, provider: Provider
) -> None:
    """Two profiles with ``tensorrt``, one with RTX; free, and fed values that are not its own."""
    add_engine(provider)
    graph = LayerProbe(ProbedGraph(bundle, "fp32", layout=Layout.STEPWISE, threads=2))
    engine = BundleBackend(bundle, "fp32", provider=provider).open_layer_probe()
    assert isinstance(engine, EngineProbe)
    free = graph.trace(batch)
    assert_same(engine.trace(batch), free)
    fed = LayerTrace([stream + np.float32(0.5) for stream in free.streams], free.states)
    forced = graph.trace(batch, forced=fed)
    assert np.abs(forced.streams[2] - free.streams[2]).max() > 0.01
    assert_same(engine.trace(batch, forced=fed), forced)
    assert cuda.left() == {}


def test_what_fails_on_the_gpu_leaves_nothing_there(
    bundle: Bundle, batch: TokenBatch, cuda: FakeCuda, add_engine: AddEngine
) -> None:
    add_engine()
    engine = BundleBackend(bundle, "fp32", provider=Provider.TENSORRT).open_layer_probe()
    engine.trace(batch)
    calls = len(cuda.calls)
    for call in range(calls):
        cuda.calls, cuda.fail_at = [], call
        with pytest.raises(ProviderError, match="failed: injected"):
            engine.trace(batch)
        assert cuda.left() == {}


def test_a_text_shorter_than_the_profile_is_refused(
    bundle: Bundle, batch: TokenBatch, cuda: FakeCuda, add_engine: AddEngine
) -> None:
    add_engine(tokens=SizeRange(8, 8, 16))
    engine = BundleBackend(bundle, "fp32", provider=Provider.TENSORRT).open_layer_probe()
    with pytest.raises(OptionError, match=r"has a text of 7 tokens; the engine .* takes 8 or more\. .*--layer-outputs"):
        engine.trace(batch)


def test_an_engine_without_layers_is_compared_by_its_graph(bundle: Bundle, add_engine: AddEngine) -> None:
    add_engine(layer_outputs=False)
    assert not has_layer_engine(bundle, "fp32", Provider.TENSORRT, None)
    assert isinstance(BundleBackend(bundle, "fp32", provider=Provider.TENSORRT).open_layer_probe(), LayerProbe)
    assert "gircse-build --provider tensorrt --layer-outputs" in _no_layers(Provider.TENSORRT)


def test_an_engine_with_layers_that_does_not_fit_is_an_error(
    bundle: Bundle, add_engine: AddEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Falling back to the graph would hide that it was not looked at."""
    add_engine()
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="12.0"))
    with pytest.raises(EngineMismatchError, match=r"was built by tensorrt 11\.1\.0, and 12\.0 .*--layer-outputs"):
        BundleBackend(bundle, "fp32", provider=Provider.TENSORRT).open_layer_probe()


def test_the_layers_of_another_precision_or_layout_do_not_count(bundle: Bundle, add_engine: AddEngine) -> None:
    add_engine()
    assert has_layer_engine(bundle, "fp32", Provider.TENSORRT, None)
    assert has_layer_engine(bundle, "fp32", Provider.TENSORRT, Layout.STEPWISE)
    assert not has_layer_engine(bundle, "fp16", Provider.TENSORRT, None)
    assert not has_layer_engine(bundle, "fp32", Provider.TENSORRT, Layout.UNROLLED)
    assert not has_layer_engine(bundle, "fp32", Provider.TENSORRT_RTX, None)
    assert not has_layer_engine(bundle, "fp32", Provider.CPU, None)
