"""Engines built with the real TensorRT for RTX, which needs no GPU."""

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.engine_build import PRECISIONS, RTX, Build, check_engine
from support.small_models import SmallModels

from gircse.export.engine import builder
from gircse.export.engine.builder import BuildOptions, build_engine
from gircse.export.engine.profiles import SizeRange, default_specs, engine_profiles
from gircse.export.engine.tensorrt_builder import TensorRtBuilder
from gircse.reporting.progress import StageProgress, Unit
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider
from gircse.runtime.trt.engine_manifest import Stage, read_engines

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral-window", "gemma3-softcap-linear", "phi4-mini")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_graph_is_parsed(rtx: Any, small_models: SmallModels, name: str) -> None:
    found = Bundle.open(small_models.bundle(name, precisions=PRECISIONS))
    layers = {}
    for precision in PRECISIONS:
        for layout in Layout:
            builder = TensorRtBuilder(rtx, Provider.TENSORRT_RTX)
            builder.parse(found.graph(precision, layout))
            layers[precision, layout] = builder.num_layers
    assert all(layers[name, Layout.UNROLLED] > layers[name, Layout.STEPWISE] > 50 for name in PRECISIONS)


@pytest.mark.parametrize(
    ("name", "precision", "layout"),
    [
        ("llama", "fp32", "unrolled"),
        ("llama", "fp16", "stepwise"),
        ("qwen2", "bf16", "unrolled"),
        ("qwen2", "fp32", "stepwise"),
        ("qwen3", "fp16", "stepwise"),
        ("mistral-window", "bf16", "stepwise"),
        ("gemma3-softcap-linear", "fp16", "stepwise"),
        ("phi4-mini", "fp16", "stepwise"),
    ],
)
def test_engines_of_small_models(
    rtx: Any, small_models: SmallModels, tmp_path: Path, build: Build, name: str, precision: str, layout: str
) -> None:
    copy = tmp_path / name
    shutil.copytree(small_models.bundle(name, precisions=PRECISIONS), copy)
    manifest, path = build(copy, "--precision", precision, "--layout", layout, *RTX)
    check_engine(manifest, path, copy)
    assert (manifest.precision, manifest.layout, manifest.version) == (precision, layout, rtx.__version__)
    facts = Bundle.open(copy).manifest.graph
    specs = default_specs(Provider.TENSORRT_RTX, SizeRange(1, 8, 64), SizeRange(1, 48, 48))
    expected = engine_profiles(specs, facts, layout=Layout(layout), provider=Provider.TENSORRT_RTX)
    assert list(manifest.profiles) == expected


@pytest.mark.parametrize("layout", Layout)
def test_engine_without_steps(
    rtx: Any, small_models: SmallModels, tmp_path: Path, build: Build, layout: Layout
) -> None:
    shutil.copytree(small_models.bundle("llama", steps=0, layout=layout), tmp_path / "b")
    manifest, path = build(tmp_path / "b", "--layout", layout, *RTX)
    check_engine(manifest, path, tmp_path / "b")
    assert {profile.stage for profile in manifest.profiles} == {
        Stage.ANY if layout is Layout.UNROLLED else Stage.PROMPT
    }


@pytest.mark.parametrize("layout", Layout)
def test_tensorrt_is_given_the_ranges_of_the_json(
    rtx: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch, build: Build, layout: Layout
) -> None:
    """Read back from TensorRT's own profiles: an engine can only be opened on a GPU."""
    made: list[Any] = []

    class Recording:
        """The module; its builders note the profiles that they make."""

        def __getattr__(self, name: str) -> Any:
            return getattr(rtx, name)

        def Builder(self, logger: Any) -> Any:
            real = rtx.Builder(logger)

            def create_optimization_profile() -> Any:
                made.append(real.create_optimization_profile())
                return made[-1]

            return SimpleNamespace(
                create_network=real.create_network,
                create_builder_config=real.create_builder_config,
                build_serialized_network=real.build_serialized_network,
                create_optimization_profile=create_optimization_profile,
            )

    monkeypatch.setattr(builder, "import_tensorrt", lambda provider: Recording())
    manifest, _ = build(bundle, "--layout", layout, "--profiles", "a=1:2:3x4:5:48,b=1:7", "--tokens", "2:30", *RTX)
    assert [profile.name for profile in manifest.profiles] == ["a", "b"]
    for profile, real in zip(manifest.profiles, made, strict=True):
        for name, shape in profile.shapes.items():
            assert [tuple(dims) for dims in real.get_shape(name)] == [shape.min, shape.opt, shape.max]
    assert manifest.profiles[0].shapes["input_ids"].max == (3, 48)
    assert manifest.profiles[1].shapes["input_ids"].max == (7, 30)


def test_default_precision_is_the_best_of_a_gpu(rtx: Any, bundle: Path, build: Build) -> None:
    manifest = json.loads((bundle / "gircse.json").read_text())
    for best in ("fp16", "bf16", "fp32"):
        assert build(bundle, *RTX)[0].precision == best
        del manifest["variants"][best]
        (bundle / "gircse.json").write_text(json.dumps(manifest))


def test_half_precision_makes_a_smaller_plan(rtx: Any, bundle: Path, build: Build) -> None:
    sizes = {name: build(bundle, "--precision", name, *RTX)[0].plan_bytes for name in PRECISIONS}
    weights = {name: (bundle / name / "weights.bin").stat().st_size for name in PRECISIONS}
    saved = weights["fp32"] - weights["fp16"]
    assert saved > 100_000
    assert sizes["fp16"] < sizes["fp32"] - 0.7 * saved
    assert sizes["bf16"] < sizes["fp32"]


def test_one_plan_for_two_gpus(rtx: Any, bundle: Path, build: Build) -> None:
    manifest, path = build(bundle, "--provider", "tensorrt-rtx", "--sm", "8.9,12.0,8.9")
    assert manifest.compute_capabilities == ("8.9", "12.0")
    assert path.name == f"fp16-tensorrt-rtx-{rtx.__version__}-sm89-120.plan"
    check_engine(manifest, path, bundle)


def test_a_build_replaces_the_one_before(rtx: Any, bundle: Path, build: Build) -> None:
    first, path = build(bundle, *RTX)
    second, again = build(bundle, "--batch", "1:2:4", *RTX)
    assert path == again
    assert second.profiles != first.profiles
    check_engine(second, path, bundle)
    assert len(read_engines(Bundle.open(bundle))) == 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "bf16", "--layout", "stepwise", "--batch", "2:4", "--tokens", "3:9:40"),
        ("--profiles", "latency=1,wide=1:8x1:16:48", "--workspace-gib", "0.5", "--weight-streaming"),
    ],
)
def test_the_build_command_builds_it_again(rtx: Any, bundle: Path, build: Build, flags: Sequence[str]) -> None:
    manifest, path = build(bundle, *flags, *RTX)
    program, *words = shlex.split(manifest.build_command(bundle, "8.9"))
    assert program == "gircse-build"
    path.unlink()
    path.with_suffix(".json").unlink()
    again, again_path = build(Path(words[0]), *words[1:])
    assert again_path == path
    assert (again.profiles, again.settings, again.request) == (manifest.profiles, manifest.settings, manifest.request)

    # For a bundle that has moved, and another GPU.
    moved = bundle.with_name("it's moved")
    bundle.rename(moved)
    words = shlex.split(manifest.build_command(moved, "12.0"))[1:]
    other, other_path = build(Path(words[0]), *words[1:])
    assert other_path == moved / "engines" / path.name.replace("sm89", "sm120")
    assert other.profiles == manifest.profiles


def test_build_stages_and_progress(rtx: Any, bundle: Path) -> None:
    """The bar of the build goes to its end and not beyond."""
    stages: list[str] = []
    grown: list[float] = []

    class Recorded(StageProgress):
        @contextlib.contextmanager
        def stage(
            self, title: str, *, total: float | None = None, unit: Unit = Unit.WORK
        ) -> Iterator[Callable[[float], None]]:
            stages.append(title)
            assert (total == 1.0) == title.startswith("build for ")
            yield grown.append

        def note(self, text: str) -> None:
            stages.append(text.strip())

    options = BuildOptions(bundle, provider=Provider.TENSORRT_RTX, capabilities=("8.9",))
    build_engine(options, progress=Recorded())
    check, parse, cost, building, writing = stages
    assert check == "check the files of my bundle:fp16"
    assert parse == "parse the stepwise fp16 graph"
    assert re.match(r"\d+ layers, profiles: throughput; takes about 0 s, about 0\.\d\d GiB of memory \(", cost)
    assert building.endswith(", compute capability 8.9")
    assert writing.startswith("write ")
    assert sum(grown) == pytest.approx(1.0)
    assert len(grown) > 5
