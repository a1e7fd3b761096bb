"""A simulated GPU that refuses every misuse.

``FakeCuda`` keeps device memory as byte arrays at made-up addresses, and defers every copy and pass until its stream is
synchronized. Misuse raises :class:`Misuse`, which no code under test expects.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from gircse.runtime.errors import ProviderError
from gircse.runtime.trt.cuda import DeviceMemory, HostBytes

POISON = 0xFF  # as float32 it is NaN


class Misuse(Exception):
    """CUDA or TensorRT was used in a way that is an error or undefined."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise Misuse(message)


class Operation(NamedTuple):
    """Something queued in a stream."""

    run: Callable[[], None]
    graph: int | None = None
    host: int | None = None


@dataclass
class Stream:
    queue: list[Operation] = field(default_factory=list)
    captured: list[Operation] | None = None
    thread: int = 0


class FakeCuda:
    """The ``Cuda`` protocol without a GPU.

    Attributes:
        calls: names of all calls so far.
        fail_at: the call, counted from 0, that fails.
        failed: name of the call that failed.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[str] = []
        self.fail_at = fail_at
        self.failed: str | None = None
        self.streams: dict[int, Stream] = {}
        self.free_bytes = 1 << 30
        self._memory: dict[int, HostBytes] = {}
        self._host: dict[int, HostBytes] = {}
        self._graphs: dict[int, list[Operation]] = {}
        self._next = 0x7F00_0000_0000
        self._current = threading.local()
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def call(self, name: str, *, releases: bool = False) -> Iterator[None]:
        """Count a call; one that must fail does so before its effect, or after it when it releases something."""
        with self._lock:
            index = len(self.calls)
            self.calls.append(name)
            require(name == "make_current" or getattr(self._current, "yes", False), f"{name}: no device in this thread")
            fails = index == self.fail_at
            if fails:
                self.failed = name
            if fails and not releases:
                raise ProviderError(name, "failed: injected")
            yield
            if fails:
                raise ProviderError(name, "failed: injected")

    def make_current(self) -> None:
        with self.call("make_current"):
            self._current.yes = True

    def malloc(self, size: int) -> int:
        with self.call("malloc"):
            require(size > 0, "malloc of nothing")
            self._refuse_capturing("malloc")
            address = self._handle(size)
            self._memory[address] = np.full(size, POISON, np.uint8)
            return address

    def free(self, address: int) -> None:
        with self.call("free", releases=True):
            self._refuse_capturing("free")
            require(address in self._memory, f"free of {address:#x}, which is not allocated")
            del self._memory[address]

    def malloc_host(self, size: int) -> HostBytes:
        with self.call("malloc_host"):
            require(size > 0, "malloc_host of nothing")
            self._refuse_capturing("malloc_host")
            array = np.full(size, POISON, np.uint8)
            self._host[array.ctypes.data] = array
            return array

    def free_host(self, array: HostBytes) -> None:
        with self.call("free_host", releases=True):
            queued = {operation.host for stream in self.streams.values() for operation in stream.queue}
            require(array.ctypes.data not in queued, "free_host of memory that a queued copy uses")
            freed = self._host.pop(array.ctypes.data, None)
            require(freed is not None, "free_host of what is not allocated")
            array[:] = POISON  # invalidates any view that somebody kept

    def create_stream(self) -> int:
        with self.call("create_stream"):
            stream = self._handle(1)
            self.streams[stream] = Stream()
            return stream

    def destroy_stream(self, stream: int) -> None:
        with self.call("destroy_stream", releases=True):
            require(not self._stream(stream).queue, "destroy_stream of a busy stream")
            del self.streams[stream]

    def synchronize(self, stream: int) -> None:
        with self.call("synchronize", releases=True):
            found = self._stream(stream)
            require(found.captured is None, "synchronize while capturing")
            queue, found.queue = found.queue, []
            for operation in queue:
                operation.run()

    def copy_to_device(self, address: int, array: HostBytes, stream: int) -> None:
        with self.call("copy_to_device"):
            self._require_pinned(array)
            self.view(address, array.nbytes)

            def copy() -> None:
                self.view(address, array.nbytes)[:] = array

            self.push(stream, Operation(copy, host=array.ctypes.data))

    def copy_to_host(self, array: HostBytes, address: int, stream: int) -> None:
        with self.call("copy_to_host"):
            self._require_pinned(array)
            self.view(address, array.nbytes)
            array[:] = POISON  # whoever reads before the stream was synchronized reads this

            def copy() -> None:
                array[:] = self.view(address, array.nbytes)

            self.push(stream, Operation(copy, host=array.ctypes.data))

    def copy_on_device(self, target: int, source: int, size: int, stream: int) -> None:
        with self.call("copy_on_device"):
            require(size > 0 and abs(target - source) >= size, f"copy of {size} bytes from {source:#x} to {target:#x}")
            for address in (target, source):
                self.view(address, size)

            def copy() -> None:
                self.view(target, size)[:] = self.view(source, size)

            self.push(stream, Operation(copy))

    def begin_capture(self, stream: int) -> None:
        with self.call("begin_capture"):
            require(self._stream(stream).captured is None, "begin_capture while capturing")
            self._stream(stream).captured, self._stream(stream).thread = [], threading.get_ident()

    def end_capture(self, stream: int) -> int:
        with self.call("end_capture", releases=True):
            found = self._stream(stream)
            captured, found.captured = found.captured, None
            require(captured is not None, "end_capture without begin_capture")
            if self.fail_at == len(self.calls) - 1:
                return 0
            graph = self._handle(1)
            self._graphs[graph] = captured or []
            return graph

    def launch_graph(self, graph: int, stream: int) -> None:
        with self.call("launch_graph"):
            require(graph in self._graphs, f"launch of {graph:#x}, which is no graph")
            for operation in self._graphs[graph]:
                self.push(stream, operation._replace(graph=graph))

    def destroy_graph(self, graph: int) -> None:
        with self.call("destroy_graph", releases=True):
            require(graph in self._graphs, f"destroy of {graph:#x}, which is no graph")
            queued = {operation.graph for stream in self.streams.values() for operation in stream.queue}
            require(graph not in queued, "destroy_graph of a queued graph")
            del self._graphs[graph]

    def compute_capability(self) -> str:
        return "8.9"

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self.free_bytes, 1 << 34)

    @property
    def allocated(self) -> int:
        """Bytes of device memory that are allocated now."""
        return sum(map(len, self._memory.values()))

    def view(self, address: int, size: int) -> HostBytes:
        """Return a part of the device's memory."""
        with self._lock:
            for start, content in self._memory.items():
                if start <= address < start + len(content):
                    require(address + size <= start + len(content), f"{size} bytes at {address:#x} leave their buffer")
                    return content[address - start : address - start + size]
        raise Misuse(f"{size} bytes at {address:#x}, which is not allocated or freed already")

    def push(self, stream: int, operation: Operation) -> None:
        """Queue an operation, or record it."""
        with self._lock:
            found = self._stream(stream)
            (found.queue if found.captured is None else found.captured).append(operation)

    def capturing(self, stream: int) -> bool:
        return self._stream(stream).captured is not None

    def left(self) -> dict[str, int]:
        """Count what was never released."""
        return {
            name: len(held)
            for name, held in (
                ("device", self._memory),
                ("host", self._host),
                ("streams", self.streams),
                ("graphs", self._graphs),
            )
            if held
        }

    def _handle(self, size: int) -> int:
        handle = self._next
        self._next += (size // 256 + 2) * 256  # never reused, and with a gap behind it
        return handle

    def _stream(self, stream: int) -> Stream:
        require(stream in self.streams, f"stream {stream:#x} does not exist")
        return self.streams[stream]

    def _require_pinned(self, array: HostBytes) -> None:
        require(array.dtype == np.uint8 and array.flags.c_contiguous and array.nbytes, f"copy of {array.shape}")
        inside = any(
            start <= array.ctypes.data and array.ctypes.data + array.nbytes <= start + len(memory)
            for start, memory in self._host.items()
        )
        require(inside, "copy to or from memory that is not pinned")

    def _refuse_capturing(self, name: str) -> None:
        capturing = [s for s in self.streams.values() if s.captured is not None and s.thread == threading.get_ident()]
        require(not capturing, f"{name} while this thread captures")
