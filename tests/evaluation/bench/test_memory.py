"""A benchmark that does not fit in memory is refused with the numbers, before anything is loaded."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.small_models import SmallModels

from gircse.checkpoint.source import resolve_checkpoint
from gircse.evaluation import bench_command
from gircse.evaluation.bench import memory
from gircse.evaluation.bench.backends import BundleSpec, LlamaCppSpec, TorchSpec
from gircse.evaluation.bench.memory import CUDA_BYTES, check_memory, memory_need
from gircse.runtime import MeasurementError
from gircse.runtime.bundle import Bundle
from gircse.runtime.precision import SESSION_BYTES
from gircse.runtime.provider import Provider


def test_needs_grow_with_the_weights(small_models: SmallModels) -> None:
    bundle = Bundle.open(small_models.bundle("llama", precisions=("fp32", "fp16")))
    checkpoint = resolve_checkpoint(str(small_models.checkpoint("llama")))
    table = 4 * 520 * 48
    fp32 = memory_need(BundleSpec(bundle, "fp32", 1))
    assert fp32.weights > bundle.manifest.weight_bytes("fp32")  # the graph is a file too
    assert (fp32.host, fp32.device) == (SESSION_BYTES + fp32.weights + table, 0)
    fp16 = memory_need(BundleSpec(bundle, "fp16", 1))
    assert fp16.host > SESSION_BYTES + 2 * bundle.manifest.weight_bytes("fp16")  # computed in FP32
    on_gpu = memory_need(BundleSpec(bundle, "fp16", 1, provider=Provider.CUDA))
    assert (on_gpu.host, on_gpu.device) == (SESSION_BYTES, CUDA_BYTES + on_gpu.weights)
    torch = memory_need(TorchSpec(bundle, checkpoint, "fp32", 1))
    assert torch.host > torch.weights + SESSION_BYTES
    assert torch.device == 0
    gguf = checkpoint.directory / "config.json"
    llama = memory_need(LlamaCppSpec(bundle, checkpoint, gguf, "Q8_0", 1, 1, 1, 1))
    assert llama.host == SESSION_BYTES + gguf.stat().st_size + table


def test_what_does_not_fit_is_refused(
    small_models: SmallModels, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_models.bundle("llama", precisions=("fp32", "fp16"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=SESSION_BYTES))
    assert bench_command.main([str(path)]) == 2
    name = path.name
    assert (
        f"the benchmark needs 0.50 GiB together: {name}:fp32 about 0.25 GiB (weights 0.00 GiB), "
        f"{name}:fp16 about 0.25 GiB (weights 0.00 GiB) of memory; 0.25 GiB is available. Leave a backend"
    ) in capsys.readouterr().err
    spec = BundleSpec(Bundle.open(path), "fp32", 1)
    with pytest.raises(MeasurementError, match=r"needs \S+:fp32 about 0\.25 GiB \(weights \S+ GiB\) of memory; "):
        check_memory([spec])
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    check_memory([spec])
    on_gpu = replace(spec, provider=Provider.CUDA)
    for free in (None, 2 * CUDA_BYTES):
        monkeypatch.setattr(memory, "free_gpu_memory", lambda free=free: free)
        check_memory([spec, on_gpu])
    monkeypatch.setattr(memory, "free_gpu_memory", lambda: CUDA_BYTES)
    with pytest.raises(MeasurementError, match=r"needs \S+:fp32 on cuda about 1\.00 GiB .* of GPU memory; 1\.00"):
        check_memory([spec, on_gpu])


def test_without_a_driver_nobody_knows_the_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert memory.free_gpu_memory() is None
