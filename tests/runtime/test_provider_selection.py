"""Where a bundle is opened: an explicit provider or none, ``auto`` in order, and which variant is taken."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.machine import VARIANTS, Machine, add_engine
from support.small_models import add_stepwise_variants
from support.stub_onnxruntime import CPU, CUDA, TENSORRT, StubOnnxRuntime

from gircse.runtime import BundleError, Embedder, ProviderError
from gircse.runtime.errors import GircseError
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider
from gircse.runtime.trt.library import MODULES


def edit_variants(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "gircse.json").read_text())
    change(manifest["variants"])
    (bundle / "gircse.json").write_text(json.dumps(manifest))


def keep_variants(bundle: Path, *names: str) -> None:
    edit_variants(bundle, lambda variants: [variants.pop(name) for name in set(variants) - set(names)])


@pytest.mark.parametrize(
    ("provider", "match"),
    [
        ("cuda", r"^provider cuda needs CUDAExecutionProvider; .*CPUExecutionProvider\..*gircse-deploy\[gpu\]"),
        ("onnxruntime-tensorrt", r"^provider onnxruntime-tensorrt.*TensorrtExecutionProvider.*gircse-deploy\[gpu\]"),
        ("tensorrt", r"^provider tensorrt needs the package tensorrt, .*: pip install 'gircse-deploy\[tensorrt\]'$"),
        ("tensorrt-rtx", r"^provider tensorrt-rtx needs the package tensorrt_rtx, .* 'gircse-deploy\[tensorrt-rtx\]'$"),
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
    with pytest.raises(ProviderError, match=rf"provider {name}.*onnxruntime.*gircse-deploy\[{extra}\]'$"):
        Embedder(bundle, provider=provider)


@pytest.mark.parametrize("provider", Provider)
def test_a_precision_that_the_bundle_lacks(machine: Machine, bundle: Path, provider: str) -> None:
    """No other variant, and no other provider, replaces it."""
    with pytest.raises(BundleError, match=r"'fp8'.*bf16, fp16, fp32"):
        Embedder(bundle, precision="fp8", provider=provider)


def test_an_unknown_provider(machine: Machine, bundle: Path) -> None:
    with pytest.raises(GircseError, match=r"'gpu'.*auto, cpu, cuda, "):
        Embedder(bundle, provider="gpu")


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What is logged of the selection. (The level that a fixture gives caplog is lost when the test begins.)"""
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
    for reason, name in zip(reasons, ("tensorrt", "tensorrt-rtx", "cuda"), strict=True):
        assert reason.startswith(f"provider auto: skipped: provider {name}")
        assert "pip install 'gircse-deploy[" in reason  # what to do about it


def test_auto_takes_cuda(machine: Machine, bundle: Path, log: list[str]) -> None:
    """Never ONNX Runtime's TensorRT provider, which builds engines for minutes when it loads."""
    machine.install("onnxruntime", StubOnnxRuntime(TENSORRT, CUDA, CPU))
    embedder = Embedder(bundle)
    assert (embedder.provider, embedder.precision) == (Provider.CUDA, "fp16")
    assert log[0] == "provider auto: runs on cuda in fp16"
    assert len(log) == 3


def test_cuda_from_pip_is_loaded_and_stdout_left_alone(
    machine: Machine, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = machine.install("onnxruntime", StubOnnxRuntime(CUDA, CPU))
    Embedder(bundle, provider="cpu")
    assert stub.preloaded == 0
    Embedder(bundle, provider="cuda")
    assert stub.preloaded == 1
    captured = capsys.readouterr()
    assert (captured.out, "libcublas" in captured.err) == ("", True)


def test_auto_skips_cuda_where_it_does_not_start(machine: Machine, bundle: Path, log: list[str]) -> None:
    machine.install("onnxruntime", StubOnnxRuntime(CUDA, CPU, falls_back=True))
    embedder = Embedder(bundle)
    assert (embedder.provider, embedder.precision) == (Provider.CPU, "fp32")
    assert "could not start CUDAExecutionProvider" in log[-1]


def test_auto_without_an_engine_says_how_to_build_one(machine: Machine, bundle: Path, log: list[str]) -> None:
    machine.install_tensorrt(bundle)
    assert Embedder(bundle).provider is Provider.CPU
    assert f"Build one: gircse-build {bundle} --precision fp16 --provider tensorrt" in log[1]


def test_auto_prefers_an_engine(machine: Machine, bundle: Path, log: list[str]) -> None:
    machine.install("onnxruntime", StubOnnxRuntime(CUDA, CPU))
    for provider in MODULES:
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
    assert "has no tensorrt engine of fp32" in log[1]


def test_auto_does_not_hide_damage(machine: Machine, bundle: Path) -> None:
    machine.install_tensorrt(bundle)
    add_engine(bundle).write_bytes(b"plaN")
    with pytest.raises(BundleError, match="has another SHA-256"):
        Embedder(bundle)


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
        assert stub.sessions[-1].path.parent == bundle / expected
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
        (("int4-weights", "int8-weights"), "int8-weights"),
        (("int8-weights",), "int8-weights"),
    ],
)
def test_int8_is_taken_where_there_is_nothing_else(
    machine: Machine, bundle: Path, variants: tuple[str, ...], expected: str
) -> None:
    add_stepwise_variants(bundle, "int8", "int8-weights", "int4-weights", "fp8")
    keep_variants(bundle, *variants)
    assert Embedder(bundle).precision == expected  # auto, on a machine without a GPU
    stub = machine.install("onnxruntime", StubOnnxRuntime(CUDA, CPU))
    for_cpu = expected.startswith("int8")
    for provider in ("cpu", "auto") if for_cpu else ("cpu", "cuda", "auto"):
        embedder = Embedder(bundle, provider=provider)
        assert embedder.precision == expected
        assert embedder.provider is Provider.CPU or not for_cpu
        on_gpu = embedder.provider is Provider.CUDA
        assert stub.sessions[-1].path.name == ("model.onnx" if on_gpu else "stepwise.onnx")


@pytest.mark.parametrize("provider", ["cuda", "onnxruntime-tensorrt"])
@pytest.mark.parametrize("precision", ["int8", "int8-weights", "int4-weights", "fp8"])
def test_int8_graphs_are_not_for_a_gpu(machine: Machine, bundle: Path, provider: str, precision: str) -> None:
    add_stepwise_variants(bundle, precision)
    machine.install("onnxruntime", StubOnnxRuntime(TENSORRT, CUDA, CPU))
    message = f"{provider} does not run {precision}; .* runs fp16, bf16, fp32.*gircse-build"
    with pytest.raises(ProviderError, match=message):
        Embedder(bundle, provider=provider, precision=precision)


def test_the_only_variant_is_taken_whatever_its_name(machine: Machine, bundle: Path) -> None:
    edit_variants(bundle, lambda variants: variants.update(own=variants.pop("fp32")))
    keep_variants(bundle, "own")
    assert Embedder(bundle, provider="cpu").precision == "own"


@pytest.mark.parametrize("provider", ["auto", "cpu", "cuda"])
def test_several_variants_and_none_preferred(machine: Machine, bundle: Path, provider: str) -> None:
    machine.install("onnxruntime", StubOnnxRuntime(CUDA, CPU))
    edit_variants(bundle, lambda variants: variants.update(own=variants.pop("fp32"), other=variants.pop("fp16")))
    keep_variants(bundle, "own", "other")
    with pytest.raises(BundleError, match=r"precision.*other, own"):
        Embedder(bundle, provider=provider)
    assert Embedder(bundle, provider=provider, precision="own").precision == "own"


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("precision", ["bf16", None])
def test_bf16_does_not_run_on_the_cpu(machine: Machine, bundle: Path, layout: Layout, precision: str | None) -> None:
    keep_variants(bundle, "bf16")
    match = r"provider cpu cannot run .*/bf16/\w+\.onnx.*; the CPU has kernels for fp32, fp16"
    for provider in ("cpu", "auto"):
        with pytest.raises(ProviderError, match=match):
            Embedder(bundle, precision=precision, provider=provider, layout=layout)
