"""Building engines: with the real TensorRT for RTX, which needs no GPU, and with a simulated ``tensorrt``, which needs one."""

import contextlib
import errno
import hashlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import onnx
import pytest
from support.fake_cuda import FakeCuda
from support.fake_tensorrt_builder import DTypeFlag, FakeBuilderModule, IAttentionInputLayer, Layer, NoFlag
from support.small_models import SmallModels, rehash

from gircse.export.build_command import main
from gircse.export.engine import builder
from gircse.export.engine.builder import BuildOptions, build_engine
from gircse.export.engine.profiles import SizeRange, default_specs, engine_profiles
from gircse.export.engine.tensorrt_builder import TensorRtBuilder
from gircse.reporting.progress import StageProgress
from gircse.runtime.atomic_file import atomic_write
from gircse.runtime.bundle import Bundle, file_sha256
from gircse.runtime.errors import ExportError, ProviderError
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider
from gircse.runtime.trt.engine_manifest import EngineManifest, Stage, read_engines, rebuild_command, select_engine

PRECISIONS = ("fp32", "fp16", "bf16")
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral-window")
SM = ("--sm", "8.9")
RTX = ("--provider", "tensorrt-rtx", *SM)


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip(
        "tensorrt_rtx", reason="builds with TensorRT for RTX: pip install 'gircse-deploy[tensorrt-rtx]'"
    )


@pytest.fixture
def bundle(small_models: SmallModels, tmp_path: Path) -> Path:
    """A copy whose path has a space."""
    copy = tmp_path / "my bundle"
    shutil.copytree(small_models.bundle("llama", precisions=PRECISIONS), copy)
    return copy


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built here must not depend on this machine's GPU."""

    def open_cuda() -> FakeCuda:
        raise ProviderError("GPU 0: 0 GPUs are visible | an NVIDIA GPU | check nvidia-smi")

    monkeypatch.setattr("gircse.runtime.trt.cuda.open_cuda", open_cuda)


@pytest.fixture
def gpu(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 8.9."""
    monkeypatch.setattr("gircse.runtime.trt.cuda.open_cuda", FakeCuda)


Build = Callable[..., tuple[EngineManifest, Path]]
Refuse = Callable[..., str]


@pytest.fixture
def build(capsys: pytest.CaptureFixture[str]) -> Build:
    """Run gircse-build, which must succeed; return what is then read of its plan."""

    def run(bundle: Path, *flags: str) -> tuple[EngineManifest, Path]:
        capsys.readouterr()
        code = main([str(bundle), *flags])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        path = Path(captured.out.strip())
        (found,) = [plan for plan, plan_path in read_engines(Bundle.open(bundle)) if plan_path == path]
        assert path.stem == found.name
        return found, path

    return run


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run gircse-build, which must fail with one message and change nothing in engines/; return the message."""

    def run(bundle: Path, *flags: str) -> str:
        before = contents(bundle / "engines")
        capsys.readouterr()
        code = main([str(bundle), *flags])
        captured = capsys.readouterr()
        assert code == 2
        assert captured.out == ""
        message = captured.err.splitlines()[-1].removeprefix("gircse-build: error: ")
        assert captured.err.count("gircse-build: error: ") == 1
        assert message.count(" | ") == 2, message
        assert contents(bundle / "engines") == before
        return message

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")} if folder.exists() else {}


# TensorRT for RTX, the real one


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
    ],
)
def test_engines_of_small_models(
    rtx: Any, small_models: SmallModels, tmp_path: Path, build: Build, name: str, precision: str, layout: str
) -> None:
    copy = tmp_path / name
    shutil.copytree(small_models.bundle(name, precisions=PRECISIONS), copy)
    plan, path = build(copy, "--precision", precision, "--layout", layout, *RTX)
    check_plan(plan, path, copy)
    assert (plan.precision, plan.layout, plan.version) == (precision, layout, rtx.__version__)
    facts = Bundle.open(copy).manifest.graph
    specs = default_specs(Provider.TENSORRT_RTX, SizeRange(1, 8, 64), SizeRange(1, 48, 48))
    expected = engine_profiles(specs, facts, layout=Layout(layout), provider=Provider.TENSORRT_RTX)
    assert list(plan.profiles) == expected


def check_plan(plan: EngineManifest, path: Path, bundle: Path) -> None:
    """Compare a JSON with its plan and its bundle, and find it as the runtime does."""
    content = path.read_bytes()
    assert plan.plan_bytes == len(content) > 0
    assert plan.plan_sha256 == hashlib.sha256(content).hexdigest()
    assert plan.bundle_sha256 == file_sha256(bundle / "gircse.json")
    assert plan.build_seconds >= 0
    assert plan.settings["strongly_typed"] is True
    for capability in plan.compute_capabilities:
        selected = select_engine(
            Bundle.open(bundle),
            provider=plan.provider,
            version=plan.version,
            capability=capability,
            precisions=(plan.precision,),
            layout=plan.layout,
            verify=True,
        )
        assert selected == (plan, path)
    assert {file.suffix for file in path.parent.iterdir()} <= {".plan", ".json", ".cache"}  # no scratch files


@pytest.mark.parametrize("layout", Layout)
def test_engine_without_steps(
    rtx: Any, small_models: SmallModels, tmp_path: Path, build: Build, layout: Layout
) -> None:
    shutil.copytree(small_models.bundle("llama", steps=0, layout=layout), tmp_path / "b")
    plan, path = build(tmp_path / "b", "--layout", layout, *RTX)
    check_plan(plan, path, tmp_path / "b")
    assert {profile.stage for profile in plan.profiles} == {Stage.ANY if layout is Layout.UNROLLED else Stage.PROMPT}


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
    plan, _ = build(bundle, "--layout", layout, "--profiles", "a=1:2:3x4:5:48", "b=1:7", "--tokens", "2:30", *RTX)
    assert [profile.name for profile in plan.profiles] == ["a", "b"]
    for profile, real in zip(plan.profiles, made, strict=True):
        for name, shape in profile.shapes.items():
            assert [tuple(dims) for dims in real.get_shape(name)] == [shape.min, shape.opt, shape.max]
    assert plan.profiles[0].shapes["input_ids"].max == (3, 48)
    assert plan.profiles[1].shapes["input_ids"].max == (7, 30)


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
    plan, path = build(bundle, "--provider", "tensorrt-rtx", "--sm", "8.9,12.0,8.9")
    assert plan.compute_capabilities == ("8.9", "12.0")
    assert path.name == f"fp16-tensorrt-rtx-{rtx.__version__}-sm89-120.plan"
    check_plan(plan, path, bundle)


def test_a_build_replaces_the_one_before(rtx: Any, bundle: Path, build: Build) -> None:
    first, path = build(bundle, *RTX)
    second, again = build(bundle, "--batch", "1:2:4", *RTX)
    assert path == again
    assert second.profiles != first.profiles
    check_plan(second, path, bundle)
    assert len(read_engines(Bundle.open(bundle))) == 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "bf16", "--layout", "stepwise", "--batch", "2:4", "--tokens", "3:9:40"),
        ("--profiles", "latency=1", "wide=1:8x1:16:48", "--workspace-gib", "0.5"),
    ],
)
def test_the_command_in_the_json_builds_it_again(
    rtx: Any, bundle: Path, build: Build, capsys: pytest.CaptureFixture[str], flags: Sequence[str]
) -> None:
    plan, path = build(bundle, *flags, *RTX)
    program, *words = shlex.split(plan.command)
    assert program == "gircse-build"
    path.unlink()
    path.with_suffix(".json").unlink()
    again, again_path = build(Path(words[0]), *words[1:])
    assert again_path == path
    assert (again.profiles, again.settings, again.command) == (plan.profiles, plan.settings, plan.command)

    # For a bundle that has moved, and another GPU.
    moved = bundle.with_name("it's moved")
    bundle.rename(moved)
    words = shlex.split(rebuild_command(plan, moved, "12.0"))[1:]
    other, other_path = build(Path(words[0]), *words[1:])
    assert other_path == moved / "engines" / path.name.replace("sm89", "sm120")
    assert other.profiles == plan.profiles


def test_build_stages_and_progress(rtx: Any, bundle: Path) -> None:
    """The bar of the build goes to its end and not beyond."""
    stages: list[str] = []
    grown: list[float] = []

    class Recorded(StageProgress):
        @contextlib.contextmanager
        def stage(self, title: str, *, total: float | None = None) -> Iterator[Callable[[float], None]]:
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
    assert re.match(r"\d+ layers, profiles: throughput; takes about 0 s, about 0\.\d GiB of memory \(", cost)
    assert building.endswith(", compute capability 8.9")
    assert writing.startswith("write ")
    assert sum(grown) == pytest.approx(1.0)
    assert len(grown) > 5


# What is refused, by the real one where it is there


def test_no_such_precision(rtx: Any, bundle: Path, refuse: Refuse) -> None:
    assert "precision 'int4' | it has bf16, fp16, fp32 | name one" in refuse(bundle, "--precision", "int4", *RTX)


def test_no_such_layout(rtx: Any, small_models: SmallModels, refuse: Refuse) -> None:
    """K = 0 has one graph."""
    bundle = small_models.bundle("llama", steps=0, layout=Layout.UNROLLED)
    assert "layout stepwise | it has unrolled | " in refuse(bundle, *RTX)


def test_no_bundle(tmp_path: Path, refuse: Refuse) -> None:
    assert "no gircse.json | a bundle directory | " in refuse(tmp_path, *RTX)


def test_no_gpu_and_none_named(rtx: Any, bundle: Path, refuse: Refuse) -> None:
    message = refuse(bundle, "--provider", "tensorrt-rtx")
    assert "0 GPUs are visible" in message
    assert message.endswith("to build for another machine, name its GPU: --sm 8.9")


@pytest.mark.parametrize("capability", ["9.0", "1.0", "89", "sm89", "8.9,9.0", "8.9,", ""])
def test_capability_that_rtx_does_not_build_for(rtx: Any, bundle: Path, refuse: Refuse, capability: str) -> None:
    message = refuse(bundle, "--provider", "tensorrt-rtx", "--sm", capability)
    assert message.startswith(f"--sm {capability.split(',')[-1]} | this tensorrt-rtx {rtx.__version__} builds for ")
    assert " 8.9, " in message


def test_sm_120_is_capability_12_0(rtx: Any, bundle: Path, refuse: Refuse) -> None:
    assert "12.0" in refuse(bundle, "--provider", "tensorrt-rtx", "--sm", "1.20")


@pytest.mark.parametrize("flags", [("--tokens", "1:64:512"), ("--tokens", "49"), ("--profiles", "a=1x49")])
def test_more_tokens_than_the_bundle_takes(rtx: Any, bundle: Path, refuse: Refuse, flags: tuple[str, str]) -> None:
    message = refuse(bundle, *flags, *RTX)
    assert " tokens | at most the 48 of the bundle | lower --tokens, or export again with --max-tokens" in message


@pytest.mark.parametrize(
    ("profiles", "expected"),
    [
        (("a=1", "b=2", "a=3"), "--profiles: a, b, a | one profile of each name | rename one"),
        (("a",), "--profiles 'a' | NAME=BATCH or NAME=BATCHxTOKENS | "),
        (("a=8:1",), "--profiles '8:1' | sizes of 1 to 2147483647, in order | "),
    ],
)
def test_bad_profiles(rtx: Any, bundle: Path, refuse: Refuse, profiles: tuple[str, ...], expected: str) -> None:
    assert refuse(bundle, *RTX, "--profiles", *profiles).startswith(expected)


@pytest.mark.parametrize("flags", [("--batch", "8:1"), ("--tokens", "x"), ("--provider", "rtx"), ("--layout", "both")])
def test_flags_that_the_command_line_refuses(
    bundle: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main([str(bundle), *flags])
    assert f"argument {flags[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("workspace", ["0", "-1", "nan", "inf", "1e30"])
def test_bad_workspace(rtx: Any, bundle: Path, refuse: Refuse, workspace: str) -> None:
    message = refuse(bundle, "--workspace-gib", workspace, *RTX)
    assert message.startswith("--workspace-gib ")
    assert " | above 0, at most " in message


def test_build_that_rtx_cannot_make(rtx: Any, bundle: Path, refuse: Refuse) -> None:
    """Ten kilobytes of scratch memory suffice for no kernel; TensorRT's own words are passed on."""
    message = refuse(bundle, "--workspace-gib", "0.00001", *RTX)
    assert message.startswith(f"tensorrt-rtx {rtx.__version__}: the build failed: ")
    assert "workspace" in message.split(" | ")[0]


def test_operators_that_are_refused_are_named(rtx: Any, bundle: Path, refuse: Refuse) -> None:
    path = bundle / "fp16" / "stepwise.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("Unique", ["input_ids"], ["odd"], name="odd_node"))
    onnx.save(model, path)
    rehash(bundle)
    message = refuse(bundle, *RTX)
    assert message.startswith(f"{path}: TensorRT refuses Unique (odd_node): ")
    assert "report this graph, and use ONNX Runtime" in message


def test_graph_that_is_none(rtx: Any, bundle: Path, refuse: Refuse) -> None:
    path = bundle / "fp16" / "stepwise.onnx"
    path.write_bytes(b"no graph at all")
    rehash(bundle)
    assert f"{path}: TensorRT refuses " in refuse(bundle, *RTX)
    path.write_bytes(b"")  # TensorRT takes it for a network without inputs
    rehash(bundle)
    assert refuse(bundle, *RTX).endswith("| the inputs [] | the graph is not one of this version: export again")


@pytest.mark.parametrize("name", ["fp16/weights.bin", "fp16/stepwise.onnx", "tokenizer.json"])
def test_changed_bundle(rtx: Any, bundle: Path, refuse: Refuse, build: Build, name: str) -> None:
    path = bundle / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert f"{name}: SHA-256 " in refuse(bundle, *RTX)
    if "fp16" in name:
        build(bundle, "--precision", "fp32", *RTX)  # another variant is not concerned


# The simulated ``tensorrt``


def install(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Put modules in place of those that are installed; None stands for one that is not."""
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def fake(gpu: None, monkeypatch: pytest.MonkeyPatch) -> FakeBuilderModule:
    """A machine with a GPU and ``tensorrt`` alone."""
    module = FakeBuilderModule()
    install(monkeypatch, tensorrt=module, tensorrt_rtx=None)
    return module


def test_profiles_are_added_in_pairs(fake: FakeBuilderModule, bundle: Path, build: Build) -> None:
    plan, path = build(bundle)
    check_plan(plan, path, bundle)
    assert path.name == "fp16-tensorrt-11.1.0-sm89.plan"
    pairs = [("latency", "prompt"), ("latency", "step"), ("throughput", "prompt"), ("throughput", "step")]
    assert [(profile.name, profile.stage) for profile in plan.profiles] == pairs
    given = [profile.shapes for profile in fake.configs[-1].profiles]
    expected = [
        {name: (shape.min, shape.opt, shape.max) for name, shape in profile.shapes.items()} for profile in plan.profiles
    ]
    assert given == expected
    plan, _ = build(bundle, "--layout", "unrolled")
    assert [(profile.name, profile.stage) for profile in plan.profiles] == [("latency", "any"), ("throughput", "any")]


@pytest.mark.parametrize(("version", "kinds", "flag"), [("10.15.1", DTypeFlag, 2), ("11.1.0", NoFlag, 0)])
def test_networks_are_strongly_typed(
    fake: FakeBuilderModule, bundle: Path, build: Build, version: str, kinds: Any, flag: int
) -> None:
    fake.NetworkDefinitionCreationFlag, fake.__version__ = kinds, version
    plan, _ = build(bundle)
    assert fake.flags == [flag]
    assert fake.configs[-1].flags == set()  # FP32 is not computed in TF32
    assert plan.settings["strongly_typed"] is True
    assert plan.version == version


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
    plan, _ = build(bundle)
    cache = bundle / "engines" / "timing.cache"
    assert plan.settings["timing_cache"] is True
    assert fake.read_caches == [b""]
    assert cache.read_bytes() == b"8.9 timed"
    build(bundle)
    assert fake.read_caches == [b"", b"8.9 timed"]
    assert cache.read_bytes() == b"8.9 timed timed"
    assert not caplog.records
    Bundle.open(bundle).verify(None)  # it lies in the bundle and is no part of it


def test_timing_cache_of_another_gpu_is_replaced(
    fake: FakeBuilderModule, bundle: Path, build: Build, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    cache = tmp_path / "mine.cache"
    cache.write_bytes(b"7.5 timed")
    plan, _ = build(bundle, "--timing-cache", str(cache))
    assert fake.read_caches == [b"7.5 timed", b""]
    assert cache.read_bytes() == b"8.9 timed"
    assert [record.getMessage() for record in caplog.records] == [
        f"{cache}: timings of another GPU or TensorRT, not used; they will be replaced"
    ]
    assert not (bundle / "engines" / "timing.cache").exists()
    check_plan(plan, bundle / "engines" / f"{plan.name}.plan", bundle)


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
    assert refuse(bundle, "--timing-cache", str(path)) == (
        f"--timing-cache {path}: no such folder | a file in an existing one | make {path.parent}"
    )
    assert fake.configs[-1].progress_monitor is None


def test_timing_cache_that_cannot_be_written(
    fake: FakeBuilderModule, bundle: Path, tmp_path: Path, refuse: Refuse
) -> None:
    (tmp_path / "folder").mkdir()
    message = refuse(bundle, "--timing-cache", str(tmp_path / "folder"))
    assert "folder" in message.split(" | ")[0]
    assert "directory" in message.split(" | ")[0]


def test_workspace(fake: FakeBuilderModule, bundle: Path, build: Build) -> None:
    plan, _ = build(bundle)
    assert fake.configs[-1].limits == {}
    assert plan.settings["workspace_gib"] is None
    plan, _ = build(bundle, "--workspace-gib", "1.5")
    assert fake.configs[-1].limits == {"workspace": 3 << 29}
    assert plan.settings["workspace_gib"] == 1.5


@pytest.mark.parametrize("capability", ["12.0", "8.9,12.0", ""])
def test_tensorrt_builds_for_its_own_gpu_only(
    fake: FakeBuilderModule, bundle: Path, refuse: Refuse, capability: str
) -> None:
    message = refuse(bundle, "--sm", capability)
    assert message.startswith(f"--sm {capability} | the 8.9 of this GPU, the only one that tensorrt builds for | ")
    assert fake.configs == []


def test_tensorrt_takes_the_name_of_its_own_gpu(fake: FakeBuilderModule, bundle: Path, build: Build) -> None:
    assert build(bundle, *SM)[0].compute_capabilities == ("8.9",)


def test_tensorrt_needs_a_gpu(
    fake: FakeBuilderModule, no_gpu: None, monkeypatch: pytest.MonkeyPatch, bundle: Path, refuse: Refuse
) -> None:
    def open_cuda() -> FakeCuda:
        raise ProviderError("GPU 0: none | a GPU | look")

    monkeypatch.setattr("gircse.runtime.trt.cuda.open_cuda", open_cuda)
    assert refuse(bundle, *SM) == "GPU 0: none | a GPU | look"  # and no advice to name another


def test_the_flavour_is_the_one_that_is_installed(
    fake: FakeBuilderModule, monkeypatch: pytest.MonkeyPatch, bundle: Path, build: Build, refuse: Refuse
) -> None:
    assert build(bundle)[0].provider is Provider.TENSORRT
    install(monkeypatch, tensorrt_rtx=FakeBuilderModule())
    assert build(bundle)[0].provider is Provider.TENSORRT
    install(monkeypatch, tensorrt=None, tensorrt_rtx=None)
    message = refuse(bundle)
    assert message.startswith("no TensorRT is installed | tensorrt or tensorrt_rtx | ")
    assert "'gircse-deploy[tensorrt]' or pip install 'gircse-deploy[tensorrt-rtx]'" in message


@pytest.mark.parametrize(("provider", "name"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_the_flavour_that_was_named_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, refuse: Refuse, provider: str, name: str
) -> None:
    """The other one would do, and is not asked for."""
    install(monkeypatch, tensorrt=FakeBuilderModule(), tensorrt_rtx=FakeBuilderModule())
    install(monkeypatch, **{name: None})
    message = refuse(bundle, "--provider", provider, *SM)
    assert message.startswith(f"{provider}: {name} is not installed ")
    assert message.endswith(f"pip install 'gircse-deploy[{provider}]'")


def test_packages_of_the_build_that_are_missing(monkeypatch: pytest.MonkeyPatch, bundle: Path, refuse: Refuse) -> None:
    monkeypatch.delitem(sys.modules, "gircse.export.engine.builder")
    install(monkeypatch, psutil=None)
    assert refuse(bundle, *SM).startswith("psutil is not installed | the packages of the build | ")


@pytest.mark.parametrize(
    ("messages", "expected"), [(["out of memory", "and its echo"], "out of memory"), ([], "no reason given")]
)
def test_builder_that_returns_nothing(
    fake: FakeBuilderModule, bundle: Path, refuse: Refuse, messages: list[str], expected: str
) -> None:
    fake.refuse, fake.messages = {"build_serialized_network"}, messages
    message = refuse(bundle)
    assert message.startswith(f"tensorrt 11.1.0: the build failed: {expected} | an engine | ")
    assert contents(bundle / "engines") == {}


def test_every_refused_operator_is_named(fake: FakeBuilderModule, bundle: Path, refuse: Refuse) -> None:
    fake.refuse = {"parse_from_file"}
    assert "TensorRT refuses Unique (a/b): no importer; Det (): only float | operators that tensorrt 11.1.0 " in refuse(
        bundle
    )


def test_builder_that_cannot_start(rtx: Any, bundle: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    def Builder(logger: Any) -> Any:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(rtx, "Builder", Builder)
    assert "tensorrt-rtx: pybind11::init(): factory function returned nullptr | a TensorRT" in refuse(bundle, *RTX)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, TypeError])
def test_shapes_that_tensorrt_refuses(
    fake: FakeBuilderModule, bundle: Path, refuse: Refuse, kind: type[Exception]
) -> None:
    """What it raises depends on the TensorRT: a ValueError, or for RTX a RuntimeError."""
    fake.shape_error = kind("inconsistent\nInvoked with: 1")
    message = refuse(bundle)
    assert message.startswith("profile latency, ")
    assert ": inconsistent | ShapeRange(" in message


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("add_optimization_profile", "profile latency (prompt): refused by TensorRT | "),
        ("set_timing_cache", "a new timing cache: refused by TensorRT | "),
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
    assert "| the inputs ['input_ids', 'position_ids'] | the graph is not one of this version: export again" in message


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_disk_that_is_full(
    fake: FakeBuilderModule,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Build,
    suffix: str,
    *,
    earlier: bool,
) -> None:
    """Plan and JSON appear together or not at all, and an earlier pair stays as it was."""
    if earlier:
        build(bundle)
    before = contents(bundle / "engines")

    @contextlib.contextmanager
    def filling(path: Path) -> Iterator[BinaryIO]:
        with atomic_write(path) as file:
            if path.suffix == suffix:
                file.write(b"the first bytes")
                file.flush()
                raise OSError(errno.ENOSPC, "No space left on device")
            yield file

    monkeypatch.setattr(builder, "atomic_write", filling)
    with pytest.raises(ExportError, match=r"engines: No space left on device \| room and .* nothing was left behind"):
        build_engine(BuildOptions(bundle, batch=SizeRange(1, 1, 2)))
    after = contents(bundle / "engines")
    del after["timing.cache"]
    before.pop("timing.cache", None)
    assert after == before


@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_disk_that_is_full_when_the_last_bytes_are_written(
    fake: FakeBuilderModule, bundle: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """What a file's buffer still holds is written when it is flushed or closed."""

    @contextlib.contextmanager
    def filling(path: Path) -> Iterator[Any]:
        def fail() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with atomic_write(path) as file:
            yield SimpleNamespace(write=file.write, flush=fail) if path.suffix == suffix else file
            if path.suffix == suffix:
                fail()

    monkeypatch.setattr(builder, "atomic_write", filling)
    with pytest.raises(ExportError, match="No space left"):
        build_engine(BuildOptions(bundle))
    assert set(contents(bundle / "engines")) == {"timing.cache"}


def test_folder_that_cannot_be_made(fake: FakeBuilderModule, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "engines").write_bytes(b"a file")
    assert main([str(bundle)]) == 2
    assert "engines: File exists | room and permission to write | " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resource", "expected"),
    [
        ("virtual_memory", "memory: 0.0 GiB available | about 0.5 GiB | close other programs"),
        ("disk_usage", "GiB free | 0.0 GiB | free some space"),
    ],
)
def test_too_little_memory_or_disk(
    fake: FakeBuilderModule,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuse: Refuse,
    resource: str,
    expected: str,
) -> None:
    few = SimpleNamespace(available=1000, free=1000)
    monkeypatch.setattr(build.psutil, resource, lambda *path: few)
    assert refuse(bundle).endswith(expected)
    assert fake.configs[-1].progress_monitor is None  # said before the build


def test_slow_builds_are_announced(
    fake: FakeBuilderModule, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.layers = [Layer("other")] * 3
    assert main([str(bundle)]) == 0
    shown = capsys.readouterr().err
    assert "3 layers, profiles: latency, throughput; takes minutes, for it times its kernels, about 0.5 GiB" in shown
    assert "square of the layers" not in shown
    monkeypatch.setattr(builder, "SLOW_BUILD_SECONDS", 1e-9)
    assert main([str(bundle)]) == 0
    assert "build time grows with the square of the layers: --layout stepwise" in capsys.readouterr().err
