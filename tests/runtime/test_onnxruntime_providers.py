"""What is asked of ONNX Runtime's providers, and what is kept on the GPU; on a stub."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from support.machine import TEXTS, Machine
from support.stub_onnxruntime import CPU, CUDA, TENSORRT, StubOnnxRuntime

from gircse.runtime import Embedder, ProviderError
from gircse.runtime.bundle import Bundle
from gircse.runtime.device_rows import expand_model
from gircse.runtime.ort_package import check_release
from gircse.runtime.ort_session import open_session
from gircse.runtime.tensor_names import cache_names


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
    match = rf"provider {provider}.* could not start {name} .*{CPU}.*1\.99"
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


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_prefixes_stay_on_the_gpu(
    machine: Machine, bundle: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    stub = machine.install("onnxruntime", StubOnnxRuntime(TENSORRT, CUDA, CPU))
    monkeypatch.setattr("gircse.runtime.prefix_cache.WORTH_TOKENS_GPU", 8)
    on_gpu = {"provider": "cuda", "precision": precision, "layout": "stepwise", "prefix_cache": True}
    embedder = Embedder(bundle, **on_gpu)
    for _ in range(2):
        found = embedder.encode(TEXTS, all_steps=True, instruction="Find what answers it")
    info = embedder.prefix_cache_info()
    assert (info.misses, info.hits, info.prefixes) == (1, 1, 1)
    decoder, expander = stub.sessions[-2:]
    past = cache_names("past", embedder.manifest.graph.num_layers)
    assert [list(binding.outputs.values()) for binding in expander.bindings] == 2 * len(past) * [["cuda"]]
    passes = embedder.steps + 1
    computed, *runs = decoder.bindings
    assert len(runs) == 2 * passes
    expanded = [binding.results[0] for binding in expander.bindings]
    for first, values in zip(runs[::passes], (expanded[: len(past)], expanded[len(past) :]), strict=True):
        assert [first.values[name] for name in past] == values
    kept = [binding.values["x"] for binding in expander.bindings]
    assert kept == 2 * computed.results
    item_bytes = 2 if precision == "fp16" else 4  # the CPU that stands for a GPU runs FP32 in place of BF16
    assert info.size == item_bytes * sum(np.prod(value.shape()) for value in computed.results)
    stand_in = {"provider": "cpu", "precision": "fp32" if precision == "bf16" else precision, "layout": "stepwise"}
    with Embedder(bundle, **stand_in) as cpu:
        np.testing.assert_array_equal(found, cpu.encode(TEXTS, all_steps=True, instruction="Find what answers it"))


def test_prefixes_on_a_gpu_are_asked_for(machine: Machine, bundle: Path) -> None:
    machine.install("onnxruntime", StubOnnxRuntime(TENSORRT, CUDA, CPU))
    for options, has_one in (
        ({"provider": "cuda", "layout": "stepwise"}, False),
        ({"provider": "cuda", "prefix_cache": True}, False),  # unrolled
        ({"provider": "cuda", "layout": "stepwise", "prefix_cache": True}, True),
        ({"provider": "onnxruntime-tensorrt", "layout": "stepwise", "prefix_cache": True}, False),
    ):
        with Embedder(bundle, **options) as embedder:
            assert bool(embedder.prefix_cache_info().max_size) == has_one


def test_the_graph_that_repeats_rows() -> None:
    for onnx_type, dtype in ((onnx.TensorProto.FLOAT, np.float32), (onnx.TensorProto.FLOAT16, np.float16)):
        session = onnxruntime.InferenceSession(expand_model(onnx_type), providers=[CPU])
        row = np.arange(6, dtype=dtype).reshape(1, 2, 3)
        (found,) = session.run(None, {"x": row, "s": np.array([4, 2, 3])})
        np.testing.assert_array_equal(found, np.repeat(row, 4, 0))
    model = onnx.load_from_string(expand_model(onnx.TensorProto.BFLOAT16))
    onnx.checker.check_model(model)
    assert {value.type.tensor_type.elem_type for value in (model.graph.input[0], *model.graph.output)} == {16}


@pytest.mark.parametrize(
    ("version", "precision", "runs"),
    [
        ("1.31.1", "fp32", True),
        ("1.31.1", "int8", False),
        ("1.32.0", "int8", True),
        ("1.29.0.dev1+cu13", "fp16", False),
    ],
)
def test_a_release_that_runs_a_precision_wrong_is_refused(version: str, precision: str, runs: bool) -> None:
    onnxruntime = SimpleNamespace(__version__=version)
    if runs:
        check_release(onnxruntime, precision)
        return
    with pytest.raises(ProviderError, match=rf"onnxruntime {re.escape(version)} cannot run {precision}") as caught:
        check_release(onnxruntime, precision)
    assert "pip install -U onnxruntime" in str(caught.value)


def test_a_session_of_a_release_that_runs_its_precision_wrong_does_not_open(machine: Machine, bundle: Path) -> None:
    stub = machine.install("onnxruntime", StubOnnxRuntime(CPU))
    stub.__version__ = "1.24.3"
    with pytest.raises(ProviderError, match=r"onnxruntime 1\.24\.3 cannot run fp32; it takes 1\.24\.4 or later"):
        open_session(Bundle.open(bundle), "fp32")
    assert not stub.sessions
