"""The wrapper over cuda-bindings, as far as it goes without a GPU."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gircse.runtime.errors import ProviderError
from gircse.runtime.trt.cuda import CudaRuntime, cuda_device


class Bindings:
    """What ``cuda.bindings.runtime`` looks like: functions that return a tuple with an error code in front."""

    cudaError_t = SimpleNamespace(
        cudaSuccess=SimpleNamespace(name="cudaSuccess"),
        cudaErrorMemoryAllocation=SimpleNamespace(name="cudaErrorMemoryAllocation"),
        cudaErrorInsufficientDriver=SimpleNamespace(name="cudaErrorInsufficientDriver"),
        cudaErrorNoDevice=SimpleNamespace(name="cudaErrorNoDevice"),
        cudaErrorLaunchFailure=SimpleNamespace(name="cudaErrorLaunchFailure"),
    )
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="across"
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=8, cudaDevAttrComputeCapabilityMinor=9)
    cudaStreamNonBlocking = 1

    def __init__(self, **errors: str) -> None:
        self.errors, self.calls = errors, list[tuple[Any, ...]]()
        self.host = np.zeros(64, np.uint8)
        self.values = {
            "cudaGetDeviceCount": (1,),
            "cudaMalloc": (4096,),
            "cudaMallocHost": (self.host.ctypes.data,),
            "cudaStreamCreateWithFlags": (7,),
            "cudaStreamEndCapture": (8,),
            "cudaGraphInstantiate": (9,),
            "cudaMemGetInfo": (1 << 20, 1 << 30),
        }

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name == "cudaGetErrorString":
                return self.cudaError_t.cudaSuccess, b"in words"
            error = getattr(self.cudaError_t, self.errors.get(name, "cudaSuccess"))
            values = (arguments[0],) if name == "cudaDeviceGetAttribute" else self.values.get(name, ())
            return (error, *(values if name not in self.errors else [None] * len(values)))

        return call


def test_cuda_calls_have_the_arguments_that_the_bindings_take() -> None:
    api = Bindings()
    cuda = cuda_device(api, 0)
    array = cuda.malloc_host(64)
    array[:] = 3
    assert api.host.tolist() == [3] * 64
    assert cuda.malloc(512) == 4096
    assert cuda.create_stream() == 7
    cuda.copy_to_device(4096, array[:16], 7)
    cuda.copy_to_host(array[16:32], 4096, 7)
    cuda.copy_on_device(8192, 4096, 256, 7)
    cuda.begin_capture(7)
    assert cuda.end_capture(7) == 9
    cuda.launch_graph(9, 7)
    assert cuda.compute_capability() == "8.9"
    assert cuda.memory() == (1 << 20, 1 << 30)
    address = api.host.ctypes.data
    assert api.calls == [
        ("cudaGetDeviceCount",),
        ("cudaSetDevice", 0),
        ("cudaMallocHost", 64),
        ("cudaMalloc", 512),
        ("cudaStreamCreateWithFlags", 1),
        ("cudaMemcpyAsync", 4096, address, 16, "up", 7),
        ("cudaMemcpyAsync", address + 16, 4096, 16, "down", 7),
        ("cudaMemcpyAsync", 8192, 4096, 256, "across", 7),
        ("cudaStreamBeginCapture", 7, "thread"),
        ("cudaStreamEndCapture", 7),
        ("cudaGraphInstantiate", 8, 0),
        ("cudaGraphDestroy", 8),
        ("cudaGraphLaunch", 9, 7),
        ("cudaDeviceGetAttribute", 8, 0),
        ("cudaDeviceGetAttribute", 9, 0),
        ("cudaMemGetInfo",),
    ]


@pytest.mark.parametrize(
    ("errors", "device", "message"),
    [
        (
            {"cudaGetDeviceCount": "cudaErrorInsufficientDriver"},
            0,
            r"failed: cudaErrorInsufficientDriver; .* a newer NVIDIA driver",
        ),
        ({"cudaGetDeviceCount": "cudaErrorNoDevice"}, 0, "GPU 0 is missing: 0 NVIDIA GPUs are visible"),
        ({}, 3, "GPU 3 is missing: 1 NVIDIA GPUs are visible"),
        ({"cudaSetDevice": "cudaErrorLaunchFailure"}, 0, "cudaSetDevice failed: cudaErrorLaunchFailure, in words"),
    ],
)
def test_no_usable_gpu(errors: dict[str, str], device: int, message: str) -> None:
    with pytest.raises(ProviderError, match=message):
        cuda_device(Bindings(**errors), device)


def test_cuda_errors_have_their_names() -> None:
    full = CudaRuntime(Bindings(cudaMalloc="cudaErrorMemoryAllocation"), 0)
    with pytest.raises(ProviderError, match=r"allocate 2 MiB \(cudaErrorMemoryAllocation\); 1 of 1024 MiB are free"):
        full.malloc(2 << 20)
    lost = CudaRuntime(Bindings(cudaStreamSynchronize="cudaErrorLaunchFailure"), 0)
    with pytest.raises(ProviderError, match="cudaStreamSynchronize failed: cudaErrorLaunchFailure, in words"):
        lost.synchronize(7)
    broken = Bindings(cudaGraphInstantiate="cudaErrorLaunchFailure")
    with pytest.raises(ProviderError, match="cudaGraphInstantiate"):
        CudaRuntime(broken, 0).end_capture(7)
    assert ("cudaGraphDestroy", 8) in broken.calls


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("make_current", ()),
        ("malloc", (8,)),
        ("free", (256,)),
        ("malloc_host", (8,)),
        ("free_host", (np.zeros(8, np.uint8),)),
        ("create_stream", ()),
        ("destroy_stream", (1,)),
        ("synchronize", (1,)),
        ("copy_to_device", (256, np.zeros(8, np.uint8), 1)),
        ("copy_to_host", (np.zeros(8, np.uint8), 256, 1)),
        ("begin_capture", (1,)),
        ("end_capture", (1,)),
        ("launch_graph", (1, 1)),
        ("destroy_graph", (1,)),
        ("compute_capability", ()),
        ("memory", ()),
    ],
)
def test_the_real_bindings_take_the_arguments(name: str, arguments: tuple[Any, ...]) -> None:
    """Without a driver every call fails with an error of CUDA, and none because of its arguments."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    error, _ = runtime.cudaGetDeviceCount()
    if error == runtime.cudaError_t.cudaSuccess:
        pytest.skip("the addresses are made up, and there is a GPU")
    with pytest.raises(ProviderError, match=rf"^cuda\w+ failed: {error.name}, "):
        getattr(CudaRuntime(runtime, 0), name)(*arguments)
