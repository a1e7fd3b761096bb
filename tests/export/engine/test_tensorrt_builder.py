"""Builds with a simulated ``tensorrt``, which needs a GPU; TensorRT itself says yes or no only on one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.engine_build import RTX, SM, Build, Refuse, check_engine, contents, install, no_cuda
from support.fake_tensorrt_builder import DTypeFlag, FakeBuilderModule, IAttentionInputLayer, Layer, NoFlag

from gircse.runtime.bundle import Bundle
from gircse.runtime.provider import Provider


def test_profiles_are_added_in_pairs(fake: FakeBuilderModule, bundle: Path, build: Build) -> None:
    manifest, path = build(bundle)
    check_engine(manifest, path, bundle)
    assert path.name == "fp16-tensorrt-11.1.0-sm89.plan"
    pairs = [("latency", "prompt"), ("latency", "step"), ("throughput", "prompt"), ("throughput", "step")]
    assert [(profile.name, profile.stage) for profile in manifest.profiles] == pairs
    given = [profile.shapes for profile in fake.configs[-1].profiles]
    expected = [
        {name: (shape.min, shape.opt, shape.max) for name, shape in profile.shapes.items()}
        for profile in manifest.profiles
    ]
    assert given == expected
    manifest, _ = build(bundle, "--layout", "unrolled")
    assert [(profile.name, profile.stage) for profile in manifest.profiles] == [
        ("latency", "any"),
        ("throughput", "any"),
    ]


@pytest.mark.parametrize(("version", "kinds", "flag"), [("10.15.1", DTypeFlag, 2), ("11.1.0", NoFlag, 0)])
def test_networks_are_strongly_typed(
    fake: FakeBuilderModule, bundle: Path, build: Build, version: str, kinds: Any, flag: int
) -> None:
    fake.NetworkDefinitionCreationFlag, fake.__version__ = kinds, version
    manifest, _ = build(bundle)
    assert fake.flags == [flag]
    assert fake.configs[-1].flags == set()  # FP32 is not computed in TF32
    assert manifest.settings["strongly_typed"] is True
    assert manifest.version == version


@pytest.mark.parametrize("known", [True, False])
def test_attention_may_be_decomposed(fake: FakeBuilderModule, bundle: Path, build: Build, *, known: bool) -> None:
    """TensorRT 10 has no such layer, so there is nothing to allow."""
    fake.layers = [Layer("other"), Layer("attention")]
    fake.LayerType = fake.LayerType if known else SimpleNamespace()
    other, attention = fake.layers
    build(bundle)
    assert attention.attention.decomposable is known
    assert isinstance(attention, IAttentionInputLayer) is known
    assert other.attention.decomposable is False


def test_timing_cache_is_kept_between_builds(
    fake: FakeBuilderModule, bundle: Path, build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, _ = build(bundle)
    cache = bundle / "engines" / "timing.cache"
    assert manifest.settings["timing_cache"] is True
    assert fake.read_caches == [b""]
    assert cache.read_bytes() == b"8.9 timed"
    build(bundle)
    assert fake.read_caches == [b"", b"8.9 timed"]
    assert cache.read_bytes() == b"8.9 timed timed"
    assert not caplog.records
    Bundle.open(bundle).verify(None)  # it lies in the bundle without being part of it


def test_timing_cache_of_another_gpu_is_replaced(
    fake: FakeBuilderModule, bundle: Path, build: Build, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    cache = tmp_path / "mine.cache"
    cache.write_bytes(b"7.5 timed")
    manifest, _ = build(bundle, "--timing-cache", str(cache))
    assert fake.read_caches == [b"7.5 timed", b""]
    assert cache.read_bytes() == b"8.9 timed"
    assert [record.getMessage() for record in caplog.records] == [
        f"{cache} has the timings of another GPU or TensorRT; they are not used and will be replaced"
    ]
    assert not (bundle / "engines" / "timing.cache").exists()
    check_engine(manifest, bundle / "engines" / f"{manifest.name}.plan", bundle)


def test_a_failed_build_keeps_the_timing_cache(
    fake: FakeBuilderModule, bundle: Path, build: Build, refuse: Refuse
) -> None:
    build(bundle)
    fake.refuse = {"build_serialized_network"}
    refuse(bundle)  # compares everything in engines/
    assert (bundle / "engines" / "timing.cache").read_bytes() == b"8.9 timed"


def test_timing_cache_in_a_folder_that_is_not_there(
    fake: FakeBuilderModule, bundle: Path, tmp_path: Path, refuse: Refuse
) -> None:
    """Said before the build, which may take an hour, not after it."""
    path = tmp_path / "nowhere" / "timing.cache"
    message = refuse(bundle, "--timing-cache", str(path))
    assert message == f"--timing-cache {path} is in {path.parent}, which is not a folder."
    assert fake.configs[-1].progress_monitor is None


def test_timing_cache_that_is_a_folder(fake: FakeBuilderModule, bundle: Path, tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "folder").mkdir()
    message = refuse(bundle, "--timing-cache", str(tmp_path / "folder"))
    assert message == f"--timing-cache {tmp_path / 'folder'} is a folder; it has to be a file."
    assert fake.configs[-1].progress_monitor is None  # said before the build


def test_workspace(fake: FakeBuilderModule, bundle: Path, build: Build) -> None:
    manifest, _ = build(bundle)
    assert fake.configs[-1].limits == {}
    assert manifest.request.workspace_gib is None
    manifest, _ = build(bundle, "--workspace-gib", "1.5")
    assert fake.configs[-1].limits == {"workspace": 3 << 29}
    assert manifest.request.workspace_gib == 1.5


def test_weight_streaming(
    fake: FakeBuilderModule, bundle: Path, build: Build, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _ = build(bundle)
    assert "streaming" not in fake.configs[-1].flags
    assert not manifest.request.weight_streaming
    manifest, _ = build(bundle, "--weight-streaming")
    assert "streaming" in fake.configs[-1].flags
    assert manifest.request.weight_streaming
    assert manifest.settings["weight_streaming"] is True
    monkeypatch.setattr(FakeBuilderModule, "BuilderFlag", SimpleNamespace(DISABLE_TIMING_CACHE="off", TF32="TF32"))
    assert refuse(bundle, "--weight-streaming") == "--weight-streaming is unknown to tensorrt 11.1.0."


@pytest.mark.parametrize("capability", ["12.0", "8.9,12.0", ""])
def test_tensorrt_builds_for_its_own_gpu_only(
    fake: FakeBuilderModule, bundle: Path, refuse: Refuse, capability: str
) -> None:
    message = refuse(bundle, "--sm", capability)
    named = ", ".join(map(repr, capability.split(",")))
    assert message.startswith(f"--sm has {named}; tensorrt builds only for the GPU of this machine, 8.9. ")
    assert fake.configs == []


def test_tensorrt_takes_the_name_of_its_own_gpu(fake: FakeBuilderModule, bundle: Path, build: Build) -> None:
    assert build(bundle, *SM)[0].compute_capabilities == ("8.9",)


def test_tensorrt_needs_a_gpu(
    fake: FakeBuilderModule, monkeypatch: pytest.MonkeyPatch, bundle: Path, refuse: Refuse
) -> None:
    monkeypatch.setattr("gircse.runtime.trt.cuda.open_cuda", no_cuda)
    message = refuse(bundle, *SM)
    assert message == "GPU 0 is missing: 0 NVIDIA GPUs are visible. Check nvidia-smi."  # and no advice to name another


def test_the_provider_is_the_one_that_is_installed(
    fake: FakeBuilderModule, monkeypatch: pytest.MonkeyPatch, bundle: Path, build: Build, refuse: Refuse
) -> None:
    assert build(bundle)[0].provider is Provider.TENSORRT
    install(monkeypatch, tensorrt_rtx=FakeBuilderModule())
    assert build(bundle)[0].provider is Provider.TENSORRT
    install(monkeypatch, tensorrt=None, tensorrt_rtx=None)
    message = refuse(bundle)
    assert message.startswith("TensorRT is not installed, neither tensorrt nor tensorrt_rtx. Install it: pip install ")
    assert "'gircse-deploy[tensorrt]' or pip install 'gircse-deploy[tensorrt-rtx]'" in message


@pytest.mark.parametrize(("provider", "name"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_the_provider_that_was_named_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, refuse: Refuse, provider: str, name: str
) -> None:
    """The other one would do, and is not asked for."""
    install(monkeypatch, tensorrt=FakeBuilderModule(), tensorrt_rtx=FakeBuilderModule())
    install(monkeypatch, **{name: None})
    message = refuse(bundle, "--provider", provider, *SM)
    assert message.startswith(f"provider {provider} needs the package {name}, which cannot be imported ")
    assert message.endswith(f"pip install 'gircse-deploy[{provider}]'")


@pytest.mark.parametrize(
    ("messages", "expected"), [(["out of memory", "and its echo"], "out of memory"), ([], "it gives no reason")]
)
def test_builder_that_returns_nothing(
    fake: FakeBuilderModule, bundle: Path, refuse: Refuse, messages: list[str], expected: str
) -> None:
    fake.refuse, fake.messages = {"build_serialized_network"}, messages
    message = refuse(bundle)
    assert message.startswith(f"tensorrt 11.1.0 cannot build the engine: {expected}. Change ")
    assert contents(bundle / "engines") == {}


def test_every_refused_operator_is_named(fake: FakeBuilderModule, bundle: Path, refuse: Refuse) -> None:
    fake.refuse = {"parse_from_file"}
    assert "is refused by tensorrt 11.1.0: Unique (a/b): no importer, Det (): only float. Report " in refuse(bundle)


def test_builder_that_cannot_start(rtx: Any, bundle: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    def Builder(logger: Any) -> Any:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(rtx, "Builder", Builder)
    message = refuse(bundle, *RTX)
    assert message.startswith(
        "tensorrt-rtx cannot start its builder: pybind11::init(): factory function returned nullptr."
    )


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, TypeError])
def test_shapes_that_tensorrt_refuses(
    fake: FakeBuilderModule, bundle: Path, refuse: Refuse, kind: type[Exception]
) -> None:
    """What it raises depends on the TensorRT: a ValueError, or for RTX a RuntimeError."""
    fake.shape_error = kind("inconsistent\nInvoked with: 1")
    message = refuse(bundle)
    assert message.startswith("profile latency is refused for ")
    assert ": inconsistent; its shapes are (1, " in message


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("add_optimization_profile", "profile latency (prompt) is refused by TensorRT: it gives no reason."),
        ("set_timing_cache", "a new timing cache is refused by TensorRT: it gives no reason."),
    ],
)
def test_setters_that_return_false(
    fake: FakeBuilderModule, bundle: Path, refuse: Refuse, call: str, expected: str
) -> None:
    fake.refuse = {call}
    assert refuse(bundle).startswith(expected)


def test_graph_of_another_version(fake: FakeBuilderModule, bundle: Path, refuse: Refuse) -> None:
    fake.inputs = ["input_ids", "position_ids"]
    message = refuse(bundle)
    assert message.startswith(
        "the graph has the inputs ['input_ids', 'position_ids']; this gircse-deploy builds from ["
    )
    assert message.endswith(". Export the bundle again.")
