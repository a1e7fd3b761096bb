"""The few CUDA calls that a TensorRT session makes: typed, and every returned error code checked.

Addresses, streams and captured graphs are plain integers; pinned host memory is a numpy array of bytes. Sessions see
only the :class:`Cuda` protocol, so that a test can put a simulated device in its place.
"""

import ctypes
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gircse.runtime.errors import ProviderError

HostBytes = NDArray[np.uint8]

MIB = 1 << 20
INSTALL = "pip install 'gircse-deploy[tensorrt]' or pip install 'gircse-deploy[tensorrt-rtx]'"


class DeviceMemory(NamedTuple):
    """Free and total memory of a device in bytes."""

    free: int
    total: int


class Cuda(Protocol):
    """One CUDA device. Every method raises :class:`ProviderError` when its call fails.

    Copies and launches are asynchronous: they run in the order of their stream, and host memory must stay untouched
    until that stream has been synchronized.
    """

    def make_current(self) -> None:
        """Make this the calling thread's current device; CUDA keeps one per thread."""

    def malloc(self, size: int) -> int:
        """Return the address of ``size`` bytes on the device, aligned to 256; the caller frees it."""

    def free(self, address: int) -> None:
        """Free memory of :meth:`malloc`."""

    def malloc_host(self, size: int) -> HostBytes:
        """Return (size,) uint8 of pinned host memory; the caller frees it, and no view of it may outlive that."""

    def free_host(self, array: HostBytes) -> None:
        """Free memory of :meth:`malloc_host`."""

    def create_stream(self) -> int:
        """Return a stream that does not wait for the default stream; the caller destroys it."""

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream of :meth:`create_stream`."""

    def synchronize(self, stream: int) -> None:
        """Wait until everything in the stream is done."""

    def copy_to_device(self, address: int, array: HostBytes, stream: int) -> None:
        """Queue a copy of a contiguous array in pinned memory to the device."""

    def copy_to_host(self, array: HostBytes, address: int, stream: int) -> None:
        """Queue a copy from the device that fills a contiguous array in pinned memory."""

    def copy_on_device(self, target: int, source: int, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes between two places on the device that do not overlap."""

    def begin_capture(self, stream: int) -> None:
        """Record what this thread puts into the stream from now on, instead of running it."""

    def end_capture(self, stream: int) -> int:
        """Stop recording and return what was recorded, ready to launch; the caller destroys it."""

    def launch_graph(self, graph: int, stream: int) -> None:
        """Queue a graph of :meth:`end_capture`."""

    def destroy_graph(self, graph: int) -> None:
        """Destroy a graph of :meth:`end_capture`."""

    def compute_capability(self) -> str:
        """Return the device's compute capability, such as ``8.9``."""

    def memory(self) -> DeviceMemory:
        """Return how much of the device's memory is free."""


class CudaRuntime:
    """The :class:`Cuda` protocol on the package ``cuda-bindings``. Safe to share between threads."""

    def __init__(self, api: Any, device: int) -> None:
        """Take the module ``cuda.bindings.runtime`` and a device number; :func:`open_cuda` checks both."""
        self._api, self.device = api, device

    def make_current(self) -> None:
        self._call("cudaSetDevice", self.device)

    def malloc(self, size: int) -> int:
        error, address = self._api.cudaMalloc(size)
        if error == self._api.cudaError_t.cudaErrorMemoryAllocation:
            memory = self.memory()
            raise ProviderError(
                "cudaMalloc",
                f"cannot allocate {size / MIB:.0f} MiB ({error.name})",
                f"{memory.free / MIB:.0f} of {memory.total / MIB:.0f} MiB are free",
                "Use smaller batches or fewer threads, or free memory of the GPU.",
            )
        self._check("cudaMalloc", (error,))
        return int(address)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def malloc_host(self, size: int) -> HostBytes:
        address = self._call("cudaMallocHost", size)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))

    def free_host(self, array: HostBytes) -> None:
        self._call("cudaFreeHost", array.ctypes.data)

    def create_stream(self) -> int:
        return int(self._call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def copy_to_device(self, address: int, array: HostBytes, stream: int) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def copy_to_host(self, array: HostBytes, address: int, stream: int) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def copy_on_device(self, target: int, source: int, size: int, stream: int) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def begin_capture(self, stream: int) -> None:
        # Thread-local: another thread's allocation must not spoil this capture, nor be refused because of it.
        self._call("cudaStreamBeginCapture", stream, self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)

    def end_capture(self, stream: int) -> int:
        template = int(self._call("cudaStreamEndCapture", stream))
        try:
            return int(self._call("cudaGraphInstantiate", template, 0))
        finally:
            self._call("cudaGraphDestroy", template)

    def launch_graph(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def compute_capability(self) -> str:
        kinds = self._api.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMajor, self.device)
        minor = self._call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMinor, self.device)
        return f"{major}.{minor}"

    def memory(self) -> DeviceMemory:
        return DeviceMemory(*self._call("cudaMemGetInfo"))

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the bindings; return its one value, a tuple of several, or None."""
        return self._check(name, getattr(self._api, name)(*arguments))

    def _check(self, name: str, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if error != self._api.cudaError_t.cudaSuccess:
            raise ProviderError(
                name,
                f"failed: {error.name}, {self._error_text(error)}",
                None,
                "Check the GPU with nvidia-smi, then open the bundle again.",
            )
        return values[0] if len(values) == 1 else tuple(values) or None

    def _error_text(self, error: Any) -> str:
        _, text = self._api.cudaGetErrorString(error)
        return text.decode() if isinstance(text, bytes) else str(text)


def open_cuda(device: int = 0) -> CudaRuntime:
    """Open a GPU.

    Raises:
        ProviderError: the package cuda-bindings, a driver that is new enough, or that GPU is missing.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as err:
        raise ProviderError(
            "TensorRT", f"needs the package cuda-bindings 12.9 or later: {err}", None, f"Install it: {INSTALL}"
        ) from err
    return cuda_device(runtime, device)


def cuda_device(api: Any, device: int) -> CudaRuntime:
    """Return a GPU of the module ``cuda.bindings.runtime`` after checking that it is there.

    Raises:
        ProviderError: no driver, one that is too old, or no such GPU.
    """
    error, count = api.cudaGetDeviceCount()
    if error == api.cudaError_t.cudaErrorInsufficientDriver:
        raise ProviderError(
            "cudaGetDeviceCount",
            f"failed: {error.name}",
            "the installed cuda-bindings need a newer NVIDIA driver",
            "Install or update the driver, or run on the CPU (provider cpu).",
        )
    if error == api.cudaError_t.cudaErrorNoDevice or (error == api.cudaError_t.cudaSuccess and device >= count):
        raise ProviderError(
            f"GPU {device}",
            f"is missing: {count or 0} NVIDIA GPUs are visible",
            None,
            "Check nvidia-smi and CUDA_VISIBLE_DEVICES, or run on the CPU (provider cpu).",
        )
    opened = CudaRuntime(api, device)
    opened._check("cudaGetDeviceCount", (error, count))
    opened.make_current()
    return opened
