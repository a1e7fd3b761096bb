"""Where a bundle is opened: an explicit provider or none, ``auto`` in order, and which variant is taken."""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as real_onnxruntime
import pytest
from support.fake_cuda import FakeCuda
from support.fake_tensorrt import FakeTensorRt, tiny_run
from support.small_models import SmallModels, add_stepwise_variants

from gircse.export.engine.profiles import ProfileSpec, SizeRange, engine_profiles
from gircse.runtime import BundleError, Embedder, ProviderError
from gircse.runtime.bundle import Bundle, file_sha256
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider
from gircse.runtime.tensor_names import cache_names
from gircse.runtime.trt.engine_manifest import EngineManifest

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
MAX_BATCH, MAX_TOKENS = 3, 20

TEXTS = [
    "a short one",
    "two",
    "a text with a few more words in it",
    "",
    "how do I reset my PIN",
    "x",
    "two",
    "last one",
]

VARIANTS = ("fp32", "fp16", "bf16")


@pytest.fixture
def bundle(small_models: SmallModels, tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(small_models.bundle("llama", precisions=VARIANTS), copy)
    return copy


class StubOnnxRuntime(ModuleType):
    """The module ``onnxruntime`` with any providers; what it runs, it runs on the CPU.

    Attributes:
        sessions: every session that was opened.
        asked: the providers that each was asked for, with their options.
        falls_back: sessions go on with the CPU alone, as ONNX Runtime does where a GPU fails.
    """

    OrtValue = real_onnxruntime.OrtValue
    SessionOptions = real_onnxruntime.SessionOptions
    __version__ = "1.99"

    def __init__(self, *available: str, falls_back: bool = False) -> None:
        super().__init__("onnxruntime")
        self.available, self.falls_back = list(available), falls_back
        self.sessions: list[StubSession] = []
        self.asked: list[list[tuple[str, dict[str, str]]]] = []

    def get_available_providers(self) -> list[str]:
        return self.available

    def InferenceSession(
        self, path: str, options: Any, *, providers: list[tuple[str, dict[str, str]]]
    ) -> "StubSession":
        self.asked.append(providers)
        names = [name for name, _ in providers]
        self.sessions.append(StubSession(path, options, [CPU] if self.falls_back else names))
        return self.sessions[-1]


class StubSession:
    """A session that says it runs on a GPU and records what is bound to it."""

    def __init__(self, path: str, options: Any, providers: list[str]) -> None:
        self.path, self.providers = Path(path), providers
        # A GPU runs BF16; the CPU that stands for it does not.
        runnable = path.replace("/bf16/", "/fp32/") if providers != [CPU] else path
        self._session = real_onnxruntime.InferenceSession(runnable, options, providers=[CPU])
        self.bindings: list[StubBinding] = []

    def get_providers(self) -> list[str]:
        return self.providers

    def io_binding(self) -> "StubBinding":
        self.bindings.append(StubBinding(self._session.io_binding()))
        return self.bindings[-1]

    def run_with_iobinding(self, binding: "StubBinding") -> None:
        self._session.run_with_iobinding(binding.real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


class StubBinding:
    """Records what is bound: arrays of the host, values of the device, and where the outputs go."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.arrays: list[str] = []
        self.values: dict[str, Any] = {}
        self.outputs: dict[str, str] = {}
        self.results: list[Any] = []

    def bind_cpu_input(self, name: str, array: Any) -> None:
        self.arrays.append(name)
        self.real.bind_cpu_input(name, array)

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.values[name] = value
        self.real.bind_ortvalue_input(name, value)

    def bind_output(self, name: str, device: str) -> None:
        self.outputs[name] = device
        self.real.bind_output(name, "cpu")

    def get_outputs(self) -> list[Any]:
        self.results = self.real.get_outputs()
        return self.results


class Machine:
    """What is installed; nothing but ONNX Runtime for the CPU, unless a test adds to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.cuda: FakeCuda | None = None
        monkeypatch.setattr("gircse.runtime.trt.cuda.open_cuda", self._open_cuda)
        for name in ("tensorrt", "tensorrt_rtx"):
            self.install(name, None)
        self.onnxruntime = self.install("onnxruntime", StubOnnxRuntime("AzureExecutionProvider", CPU))

    def install(self, name: str, module: Any) -> Any:
        self._patch.setitem(sys.modules, name, module)
        return module

    def install_tensorrt(self, bundle: Path, provider: Provider = Provider.TENSORRT) -> FakeTensorRt:
        """Put in a GPU and a TensorRT whose engines are those of ``add_engine``."""
        self.cuda = self.cuda or FakeCuda()
        facts, rtx = Bundle.open(bundle).manifest.graph, provider is Provider.TENSORRT_RTX
        module = FakeTensorRt(self.cuda, facts, make_plan(bundle, provider), rtx=rtx)
        return self.install("tensorrt_rtx" if rtx else "tensorrt", module)

    def _open_cuda(self) -> FakeCuda:
        if self.cuda is None:
            raise ProviderError("GPU 0: 0 GPUs are visible | an NVIDIA GPU | check nvidia-smi")
        return self.cuda


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def make_plan(bundle: Path, provider: Provider, *, precision: str = "fp16") -> EngineManifest:
    facts = Bundle.open(bundle).manifest.graph
    specs = [ProfileSpec("throughput", SizeRange(1, 2, MAX_BATCH), SizeRange(1, 8, MAX_TOKENS))]
    return EngineManifest(
        schema_version=1,
        bundle_sha256=file_sha256(bundle / "gircse.json"),
        precision=precision,
        layout=Layout.STEPWISE,
        provider=provider,
        version=FakeTensorRt.__version__,
        compute_capabilities=("8.9",),
        profiles=tuple(engine_profiles(specs, facts, layout=Layout.STEPWISE, provider=provider)),
        settings={},
        command="gircse-build bundle --sm 8.9",
        build_seconds=1.0,
        plan_bytes=4,
        plan_sha256=hashlib.sha256(b"plan").hexdigest(),
    )


def add_engine(bundle: Path, provider: Provider = Provider.TENSORRT, *, precision: str = "fp16") -> Path:
    """Write an engine that ``FakeTensorRt`` loads; return the path of its plan."""
    plan = make_plan(bundle, provider, precision=precision)
    (bundle / "engines").mkdir(exist_ok=True)
    path = bundle / "engines" / f"{plan.name}.plan"
    path.with_suffix(".json").write_bytes(plan.to_json())
    path.write_bytes(b"plan")
    return path


def edit_variants(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "gircse.json").read_text())
    change(manifest["variants"])
    (bundle / "gircse.json").write_text(json.dumps(manifest))


def keep_variants(bundle: Path, *names: str) -> None:
    edit_variants(bundle, lambda variants: [variants.pop(name) for name in set(variants) - set(names)])


# An explicit provider


@pytest.mark.parametrize(
    ("provider", "match"),
    [
        ("cuda", r"^provider cuda: this onnxruntime has .*CPUExecutionProvider \| CUDAEx.* \| .*gircse-deploy\[gpu\]"),
        ("onnxruntime-tensorrt", r"^provider onnxruntime-tensorrt: .* \| TensorrtExe.* \| .*gircse-deploy\[gpu\]"),
        ("tensorrt", r"^tensorrt: tensorrt is not installed .* \| .* \| pip install 'gircse-deploy\[tensorrt\]'"),
        ("tensorrt-rtx", r"^tensorrt-rtx: tensorrt_rtx is not .* \| pip install 'gircse-deploy\[tensorrt-rtx\]'"),
    ],
)
def test_an_explicit_provider_never_falls_back(machine: Machine, bundle: Path, provider: str, match: str) -> None:
    """The CPU would do, and is not asked for."""
    with pytest.raises(ProviderError, match=match):
        Embedder(bundle, provider=provider)
    assert machine.onnxruntime.sessions == []


@pytest.mark.parametrize(
    ("provider", "extra"), [("cpu", "cpu"), ("cuda", "gpu"), ("onnxruntime-tensorrt", "gpu"), ("auto", "cpu")]
)
def test_no_onnxruntime(machine: Machine, bundle: Path, provider: str, extra: str) -> None:
    machine.install("onnxruntime", None)
    name = provider.replace("auto", "cpu")
    with pytest.raises(ProviderError, match=rf"provider {name}: onnxruntime is not .*gircse-deploy\[{extra}\]'$"):
        Embedder(bundle, provider=provider)


@pytest.mark.parametrize("provider", Provider)
def test_no_gpu_for_an_engine(machine: Machine, bundle: Path, provider: Provider) -> None:
    machine.install_tensorrt(bundle, provider)
    add_engine(bundle, provider)
    machine.cuda = None
    with pytest.raises(ProviderError, match="0 GPUs are visible"):
        Embedder(bundle, provider=provider)


@pytest.mark.parametrize("provider", ["auto", *Provider])
def test_a_precision_that_the_bundle_lacks(machine: Machine, bundle: Path, provider: str) -> None:
    """No other variant, and no other provider, makes up for it."""
    with pytest.raises(BundleError, match=r"precision 'fp8' \| it has bf16, fp16, fp32 \| name one of these"):
        Embedder(bundle, precision="fp8", provider=provider)


def test_an_unknown_provider(machine: Machine, bundle: Path) -> None:
    with pytest.raises(ProviderError, match=r"provider 'gpu': unknown \| one of auto, cpu, cuda, .* \| choose one"):
        Embedder(bundle, provider="gpu")


# auto


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What is logged of the choice. (The level that a fixture gives caplog is lost when the test begins.)"""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("gircse.runtime.provider_selection")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_auto_on_a_bare_machine(machine: Machine, bundle: Path, log: list[str]) -> None:
    embedder = Embedder(bundle)
    assert (embedder.provider, embedder.precision) == (Provider.CPU, "fp32")
    took, *reasons = log
    assert took == "provider auto: runs on cpu in fp32"
    assert len(reasons) == 3
    for reason, name in zip(reasons, ("tensorrt:", "tensorrt-rtx:", "provider cuda:"), strict=True):
        assert reason.startswith(f"provider auto: passed over: {name} ")
        assert " | " in reason  # what to do about it


def test_auto_takes_cuda(machine: Machine, bundle: Path, log: list[str]) -> None:
    """Never ONNX Runtime's TensorRT provider, which builds engines for minutes when it loads."""
    machine.install("onnxruntime", StubOnnxRuntime(TENSORRT, CUDA, CPU))
    embedder = Embedder(bundle)
    assert (embedder.provider, embedder.precision) == (Provider.CUDA, "fp16")
    assert log[0] == "provider auto: runs on cuda in fp16"
    assert len(log) == 3


def test_auto_goes_on_where_cuda_does_not_start(machine: Machine, bundle: Path, log: list[str]) -> None:
    machine.install("onnxruntime", StubOnnxRuntime(CUDA, CPU, falls_back=True))
    embedder = Embedder(bundle)
    assert (embedder.provider, embedder.precision) == (Provider.CPU, "fp32")
    assert "could not start CUDAExecutionProvider" in log[-1]


def test_auto_without_an_engine_says_how_to_build_one(machine: Machine, bundle: Path, log: list[str]) -> None:
    machine.install_tensorrt(bundle)
    assert Embedder(bundle).provider is Provider.CPU
    assert f"build it: gircse-build {bundle} --precision fp16 --provider tensorrt" in log[1]


def test_auto_prefers_an_engine(machine: Machine, bundle: Path, log: list[str]) -> None:
    machine.install("onnxruntime", StubOnnxRuntime(CUDA, CPU))
    for provider in Provider:
        machine.install_tensorrt(bundle, provider)
    add_engine(bundle, Provider.TENSORRT_RTX, precision="fp32")
    assert Embedder(bundle).provider is Provider.TENSORRT_RTX
    assert log[0] == "provider auto: runs on tensorrt-rtx in fp32"
    assert len(log) == 2
    add_engine(bundle)
    assert Embedder(bundle).provider is Provider.TENSORRT
    assert log[2:] == ["provider auto: runs on tensorrt in fp16"]


def test_auto_looks_for_the_precision_that_was_named(machine: Machine, bundle: Path, log: list[str]) -> None:
    machine.install_tensorrt(bundle)
    add_engine(bundle)
    embedder = Embedder(bundle, precision="fp32")
    assert (embedder.provider, embedder.precision) == (Provider.CPU, "fp32")
    assert "no tensorrt engine of fp32" in log[1]


def test_auto_does_not_hide_damage(machine: Machine, bundle: Path) -> None:
    machine.install_tensorrt(bundle)
    add_engine(bundle).write_bytes(b"plaN")
    with pytest.raises(BundleError, match="another SHA-256"):
        Embedder(bundle)


# Precisions


@pytest.mark.parametrize(
    ("variants", "cpu", "gpu"),
    [
        (VARIANTS, "fp32", "fp16"),
        (("fp16", "bf16"), "fp16", "fp16"),
        (("fp32", "bf16"), "fp32", "bf16"),
        (("fp32",), "fp32", "fp32"),
        (("fp16",), "fp16", "fp16"),
    ],
)
def test_default_precisions(machine: Machine, bundle: Path, variants: tuple[str, ...], cpu: str, gpu: str) -> None:
    keep_variants(bundle, *variants)
    stub = machine.install("onnxruntime", StubOnnxRuntime(TENSORRT, CUDA, CPU))
    for provider, expected in (("cpu", cpu), ("cuda", gpu), ("onnxruntime-tensorrt", gpu)):
        assert Embedder(bundle, provider=provider).precision == expected
        assert stub.sessions[-1].path == bundle / expected / "model.onnx"
    for provider in ("cpu", "cuda"):
        for precision in {"fp32", "fp16"} & set(variants):
            assert Embedder(bundle, provider=provider, precision=precision).precision == precision
            assert stub.sessions[-1].path.parent.name == precision


@pytest.mark.parametrize(
    ("variants", "expected"),
    [
        (("fp32", "int8", "int8-weights"), "fp32"),
        (("fp16", "int8"), "fp16"),
        (("int8", "int8-weights"), "int8"),
        (("int8-weights",), "int8-weights"),
    ],
)
def test_int8_is_taken_where_there_is_nothing_else(
    machine: Machine, bundle: Path, variants: tuple[str, ...], expected: str
) -> None:
    add_stepwise_variants(bundle, "int8", "int8-weights")
    keep_variants(bundle, *variants)
    assert Embedder(bundle).precision == expected  # auto, on a machine without a GPU
    stub = machine.install("onnxruntime", StubOnnxRuntime(CUDA, CPU))
    for provider in ("cpu", "cuda", "auto"):
        assert Embedder(bundle, provider=provider).precision == expected
        layout = "stepwise" if expected.startswith("int8") else "model"  # int8 has no unrolled graph
        assert stub.sessions[-1].path.name == f"{layout}.onnx"


def test_the_only_variant_is_taken_whatever_its_name(machine: Machine, bundle: Path) -> None:
    edit_variants(bundle, lambda variants: variants.update(own=variants.pop("fp32")))
    keep_variants(bundle, "own")
    assert Embedder(bundle, provider="cpu").precision == "own"


@pytest.mark.parametrize("provider", ["auto", "cpu", "cuda"])
def test_several_variants_and_none_preferred(machine: Machine, bundle: Path, provider: str) -> None:
    machine.install("onnxruntime", StubOnnxRuntime(CUDA, CPU))
    edit_variants(bundle, lambda variants: variants.update(own=variants.pop("fp32"), other=variants.pop("fp16")))
    keep_variants(bundle, "own", "other")
    with pytest.raises(BundleError, match=r"no precision named \| one of other, own \| name one of these"):
        Embedder(bundle, provider=provider)
    assert Embedder(bundle, provider=provider, precision="own").precision == "own"


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("precision", ["bf16", None])
def test_bf16_does_not_run_on_the_cpu(machine: Machine, bundle: Path, layout: Layout, precision: str | None) -> None:
    keep_variants(bundle, "bf16")
    match = r"provider cpu: .*/bf16/\w+\.onnx does not run .* \| .*fp32 or fp16 \| choose .* provider"
    for provider in ("cpu", "auto"):
        with pytest.raises(ProviderError, match=match):
            Embedder(bundle, precision=precision, provider=provider, layout=layout)


# Engines, on the simulated GPU


def expected_vectors(embedder: Embedder, texts: list[str]) -> Any:
    """Run the plain loop, text by text and without padding."""
    facts = embedder.manifest.graph
    rows = []
    for ids in embedder.tokenizer(texts):
        ids = ids or [embedder.manifest.pad_token_id]
        array = np.array([ids], np.int64)
        rows.append(tiny_run(facts, array, np.ones_like(array), steps=facts.steps, cache_type="HALF"))
    return np.concatenate([row.step_embeddings for row in rows])


@pytest.mark.parametrize("provider", Provider)
def test_engine_end_to_end(machine: Machine, bundle: Path, provider: Provider) -> None:
    """A batch of eight texts runs in parts of three, the most that the profile takes; every row is its own text's."""
    module = machine.install_tensorrt(bundle, provider)
    add_engine(bundle, provider)
    embedder = Embedder(bundle, provider=provider)
    assert (embedder.provider, embedder.precision) == (Provider(provider), "fp16")
    expected = expected_vectors(embedder, TEXTS)
    found = embedder.encode(TEXTS, batch_size=32, all_steps=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(np.unique(found[:, -1].round(4), axis=0)) == len(set(TEXTS))
    np.testing.assert_allclose(embedder.encode(TEXTS), expected[:, -1], atol=1e-5)
    np.testing.assert_allclose(embedder.encode(TEXTS, steps=2), expected[:, 1], atol=1e-5)
    np.testing.assert_allclose(embedder.encode(TEXTS[:1], batch_size=1), expected[:1, -1], atol=1e-5)
    assert module.enqueued > 0
    assert machine.onnxruntime.sessions == []  # no graph was loaded beside the engine


def test_engine_is_never_given_more_than_its_profile_takes(machine: Machine, bundle: Path) -> None:
    machine.install_tensorrt(bundle)
    add_engine(bundle)
    embedder = Embedder(bundle, provider="tensorrt")
    session = embedder._opened.session
    sizes: list[int] = []

    class Watched:
        max_batch = staticmethod(session.max_batch)

        def run(self, input_ids: Any, attention_mask: Any, *, steps: int) -> Any:
            sizes.append(len(input_ids))
            return session.run(input_ids, attention_mask, steps=steps)

    watching = Embedder.from_session(Bundle.open(bundle), Watched(), precision="fp16")
    np.testing.assert_array_equal(watching.encode(TEXTS), embedder.encode(TEXTS))
    assert sizes == [3, 3, 2]
    sizes.clear()
    watching.encode(TEXTS, batch_size=2)
    assert sizes == [2, 2, 2, 2]


def test_prompts_too_long_for_the_engine(machine: Machine, bundle: Path) -> None:
    """They fit the bundle, so they are not cut; the engine's limits and the way out are named."""
    machine.install_tensorrt(bundle)
    add_engine(bundle)
    embedder = Embedder(bundle, provider="tensorrt")
    long = "word after word " * 10
    (ids,) = embedder.tokenizer([long])
    assert MAX_TOKENS < len(ids) <= embedder.manifest.graph.max_tokens
    with pytest.raises(ValueError, match=r"profile throughput takes batch 1\.\.3, tokens 1\.\.20") as caught:
        embedder.encode(["short", long])
    came, _, remedy = str(caught.value).split(" | ")
    assert came == f"input_ids: shape (2, {len(ids)})"
    assert "rebuild: gircse-build" in remedy
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
    with pytest.raises(BundleError, match=r"golden\.safetensors: SHA-256"):
        Embedder(bundle, provider="tensorrt")
    assert Embedder(bundle, provider="tensorrt", verify=False).encode(["a"]).shape == (1, 48)


def test_engine_of_a_layout_that_was_not_built(machine: Machine, bundle: Path) -> None:
    machine.install_tensorrt(bundle)
    add_engine(bundle)
    with pytest.raises(ProviderError, match=r"no tensorrt engine .* --layout unrolled"):
        Embedder(bundle, provider="tensorrt", layout="unrolled")


# ONNX Runtime's providers, on a stub


@pytest.mark.parametrize(
    ("provider", "wanted"),
    [
        ("cpu", [CPU]),
        ("cuda", [CUDA, CPU]),
        ("onnxruntime-tensorrt", [TENSORRT, CUDA, CPU]),
    ],
)
def test_what_is_asked_of_onnxruntime(machine: Machine, bundle: Path, provider: str, wanted: list[str]) -> None:
    stub = machine.install("onnxruntime", StubOnnxRuntime(TENSORRT, CUDA, CPU))
    embedder = Embedder(bundle, provider=provider)
    assert embedder.provider == provider
    (asked,) = stub.asked
    assert [name for name, _ in asked] == wanted
    assert dict(asked).get(CUDA, {"use_tf32": "0"}) == {"use_tf32": "0"}  # FP32 is not computed in TF32


@pytest.mark.parametrize(("provider", "name"), [("cuda", CUDA), ("onnxruntime-tensorrt", TENSORRT)])
def test_a_session_that_fell_back_is_refused(machine: Machine, bundle: Path, provider: str, name: str) -> None:
    """ONNX Runtime only warns: the vectors would be right, and slow without a reason."""
    machine.install("onnxruntime", StubOnnxRuntime(TENSORRT, CUDA, CPU, falls_back=True))
    match = rf"provider {provider}: ONNX Runtime could not start {name} and fell back to {CPU} \| .*1\.99 needs \| mend"
    with pytest.raises(ProviderError, match=match):
        Embedder(bundle, provider=provider)


@pytest.mark.parametrize("provider", ["cuda", "onnxruntime-tensorrt"])
def test_state_and_cache_stay_on_the_gpu(machine: Machine, bundle: Path, provider: str) -> None:
    stub = machine.install("onnxruntime", StubOnnxRuntime(TENSORRT, CUDA, CPU))
    embedder = Embedder(bundle, provider=provider, layout="stepwise")
    found = embedder.encode(TEXTS, all_steps=True)
    facts = embedder.manifest.graph
    passes = stub.sessions[-1].bindings
    assert len(passes) == facts.steps + 1
    past, present = (cache_names(prefix, facts.num_layers) for prefix in ("past", "present"))
    for number, binding in enumerate(passes):
        assert set(binding.outputs.values()) == {"cuda"}
        assert list(binding.outputs) == ["next_hidden", *(present if number < facts.steps else [])]
        if number:
            # Only ids and mask come from the host, and the rest is what the pass before left on the device.
            assert set(binding.arrays) == {"input_ids", "attention_mask"}
            hidden, *cache = passes[number - 1].results
            assert binding.values["hidden"] is hidden
            assert [binding.values[name] for name in past] == cache
            assert set(binding.values) == {"hidden", *past}
    cpu = Embedder(bundle, provider="cpu", precision="fp16", layout="stepwise")
    np.testing.assert_array_equal(found, cpu.encode(TEXTS, all_steps=True))
    assert stub.sessions[-1].bindings == []  # the CPU needs none
