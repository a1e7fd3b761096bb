"""An execution slot: one stream and all that one caller at a time needs to run batches in it.

    host inputs --copy--> pass 0, pass 1, ... pass steps --copy--> host outputs, then one synchronization

A prefix is copied to the device as one row and spreads to all rows of the cache there.

The KV cache and the states stay on the device between the passes. A shape that soon repeats is captured: its second run
captures every pass (see :class:`CapturedStep`), and from the third on a pass is one launch.
"""

import contextlib
import logging
from collections import OrderedDict
from typing import TypeVar

import numpy as np

from gircse.runtime import tensor_names
from gircse.runtime.errors import ProviderError
from gircse.runtime.numerics import Int64
from gircse.runtime.prefix_cache import KeysAndValues
from gircse.runtime.session import StepOutputs
from gircse.runtime.trt.cuda import Cuda, HostBytes
from gircse.runtime.trt.engine import LoadedEngine
from gircse.runtime.trt.engine_manifest import Shape
from gircse.runtime.trt.execution_context import BoundContext, CapturedStep
from gircse.runtime.trt.memory_layout import Buffer, StepBindings, aligned
from gircse.runtime.trt.profile_selection import ProfileSelection

logger = logging.getLogger(__name__)

BatchShape = tuple[int, int]
RunShape = tuple[int, int, int]
"""Texts, tokens with the prefix, and tokens of the prefix."""
Entry = TypeVar("Entry")


class CapturePolicy:
    """Whether to capture, shared by the slots of a session: what fails once is not tried again."""

    def __init__(self, shapes: int) -> None:
        """Keep the graphs of the ``shapes`` batch shapes that were used last; 0 captures nothing."""
        self.shapes = shapes

    def give_up(self, reason: str) -> None:
        """Stop capturing; log that once."""
        if self.shapes:
            self.shapes = 0
            logger.warning("no CUDA graphs, which makes small batches slower: %s", reason)


class BatchRunner:
    """Buffers and contexts for the batches of one selection of profiles, allocated once for the largest of them."""

    def __init__(
        self,
        cuda: Cuda,
        engine: LoadedEngine,
        selection: ProfileSelection,
        limits: BatchShape,
        *,
        stream: int,
        policy: CapturePolicy,
    ) -> None:
        """Allocate.

        Args:
            cuda: the device.
            engine: the engine.
            selection: the profiles.
            limits: largest batch and width that they take.
            stream: where everything runs.
            policy: whether to capture.

        Raises:
            ProviderError: out of memory; what was allocated is freed.
        """
        self._cuda, self._engine, self._stream, self._policy = cuda, engine, stream, policy
        self._profiles = (selection.prompt, selection.step)
        self._contexts: dict[int, BoundContext] = {}
        self._seen: OrderedDict[RunShape, None] = OrderedDict()
        self._captured: OrderedDict[RunShape, dict[int, CapturedStep]] = OrderedDict()
        sizes = engine.memory.buffer_bytes(*limits)
        with contextlib.ExitStack() as resources:
            self._addresses = {buffer: _device_memory(cuda, size, resources) for buffer, size in sizes.items()}
            self._scratch_bytes = aligned(max(engine.scratch_bytes(profile) for profile in self._profiles))
            self._scratch = _device_memory(cuda, self._scratch_bytes, resources)
            self._host_inputs = cuda.malloc_host(sizes[Buffer.INPUTS])
            resources.callback(cuda.free_host, self._host_inputs)
            self._host_outputs = cuda.malloc_host(sizes[Buffer.OUTPUTS])
            resources.callback(cuda.free_host, self._host_outputs)
            resources.callback(self._contexts.clear)
            self._resources = resources.pop_all()
        self._max_tokens = limits[1]
        self._host_prefix: HostBytes | None = None  # allocated for the first prefix

    def run(self, input_ids: Int64, attention_mask: Int64, *, steps: int, prefix: KeysAndValues = ()) -> StepOutputs:
        """Run one batch within the limits.

        Args:
            input_ids: (batch, tokens) int64, without those of the prefix.
            attention_mask: (batch, tokens) int64, with them.
            steps: refinement steps.
            prefix: what :meth:`compute_prefix` gave, of the beginning of every prompt.

        Returns:
            Arrays that are the caller's.

        Raises:
            ProviderError: CUDA or TensorRT refuses; the slot can only be closed then.
        """
        cuda, memory = self._cuda, self._engine.memory
        batch, tokens = attention_mask.shape
        shape = (batch, tokens, tokens - input_ids.shape[1])
        captured = self._captured_steps(shape)
        self._spread_prefix(prefix, shape)
        size = memory.write_inputs(self._host_inputs, input_ids, attention_mask, steps=steps)
        cuda.copy_to_device(self._addresses[Buffer.INPUTS], self._host_inputs[:size], self._stream)
        for number in range(memory.pass_count(steps)):
            if captured is None or not self._launch_or_capture(captured, shape, number):
                self._enqueue(self._bindings(shape, number), self._profiles[number > 0])
        results = self._host_outputs[: memory.output_bytes(batch, steps)]
        cuda.copy_to_host(results, self._addresses[Buffer.OUTPUTS], self._stream)
        cuda.synchronize(self._stream)
        return memory.read_outputs(results, batch=batch, steps=steps)

    def compute_prefix(self, input_ids: Int64) -> KeysAndValues:
        """Return keys and values of (1, tokens) int64: (1, tokens, bytes of a token) uint8, in the order of the inputs.

        Raises:
            ProviderError: CUDA or TensorRT refuses; the slot can only be closed then.
        """
        cuda, tokens = self._cuda, input_ids.shape[1]
        self.run(input_ids, np.ones_like(input_ids), steps=0)
        shape = self._engine.memory.prefix_shape(tokens)
        bindings = self._bindings((1, tokens, 0), 0)
        names = tensor_names.cache_names("present", self._engine.memory.facts.num_layers)
        staged = self._staged(len(names), shape)
        for array, name in zip(staged, names, strict=True):
            cuda.copy_to_host(array, self._address(bindings, name), self._stream)
        cuda.synchronize(self._stream)
        return tuple(array.reshape(shape).copy() for array in staged)

    def close(self) -> None:
        """Free everything; the stream must be idle."""
        with self._resources as resources:
            for captured in _shrink(self._captured, 0):
                _close_steps(captured, resources)

    def _spread_prefix(self, prefix: KeysAndValues, shape: RunShape) -> None:
        """Put keys and values where pass 0 reads them, once for every row."""
        if not prefix:
            return
        cuda, bindings = self._cuda, self._bindings(shape, 0)
        names = tensor_names.cache_names("past", self._engine.memory.facts.num_layers)
        for value, array, name in zip(prefix, self._staged(len(prefix), prefix[0].shape), names, strict=True):
            array[:] = value.reshape(-1)
            address, row = self._address(bindings, name), value.nbytes
            cuda.copy_to_device(address, array, self._stream)
            done = 1
            while done < shape[0]:  # double the rows that are there
                rows = min(done, shape[0] - done)
                cuda.copy_on_device(address + done * row, address, rows * row, self._stream)
                done += rows

    def _staged(self, count: int, shape: Shape) -> list[HostBytes]:
        """Return ``count`` arrays of bytes in pinned memory, valid until the next call; the stream must be idle."""
        if self._host_prefix is None:
            largest = self._engine.memory.prefix_shape(self._max_tokens)
            self._host_prefix = self._cuda.malloc_host(count * int(np.prod(largest)))
            self._resources.callback(self._cuda.free_host, self._host_prefix)
        size = int(np.prod(shape))
        return [self._host_prefix[at * size : (at + 1) * size] for at in range(count)]

    def _address(self, bindings: StepBindings, name: str) -> int:
        place = bindings.places[name]
        return self._addresses[place.buffer] + place.offset

    def _bindings(self, shape: RunShape, number: int) -> StepBindings:
        batch, tokens, prefix = shape
        return self._engine.memory.bindings(batch, tokens, number, prefix=prefix)

    def _enqueue(self, bindings: StepBindings, profile: int) -> None:
        if profile not in self._contexts:
            self._contexts[profile] = self._context(profile, for_graph=False)
        context = self._contexts[profile]
        context.bind(bindings, self._addresses)
        context.enqueue()

    def _context(self, profile: int, *, for_graph: bool) -> BoundContext:
        return BoundContext(
            self._engine,
            profile,
            stream=self._stream,
            scratch=self._scratch,
            scratch_bytes=self._scratch_bytes,
            for_graph=for_graph,
        )

    def _captured_steps(self, shape: RunShape) -> dict[int, CapturedStep] | None:
        """Return the captured passes of a shape, empty at its second run; None: do not capture.

        Captured shapes and candidates are both bounded by the number of shapes to keep: of a stream of texts of ever
        new lengths, only a shape that soon repeats is worth a capture, which costs as much as many plain runs. The
        stream is idle here, so the graphs of the least recently used shape can be destroyed.
        """
        limit = self._policy.shapes  # read once: another slot may give up meanwhile
        if shape in self._captured:
            self._captured.move_to_end(shape)
            return self._captured[shape]
        if shape not in self._seen:
            self._seen[shape] = None
            _shrink(self._seen, limit)
            return None
        if not limit:
            return None
        del self._seen[shape]
        self._captured[shape] = {}
        with contextlib.ExitStack() as resources:
            for captured in _shrink(self._captured, limit):
                _close_steps(captured, resources)
        return self._captured[shape]

    def _launch_or_capture(self, captured: dict[int, CapturedStep], shape: RunShape, number: int) -> bool:
        """Enqueue a captured pass, or enqueue it and capture it; False when it has to be enqueued plainly."""
        if number in captured:
            captured[number].enqueue()
            return True
        if not self._policy.shapes:
            return False
        try:
            context = self._context(self._profiles[number > 0], for_graph=True)
            context.bind(self._bindings(shape, number), self._addresses)
        except ProviderError as err:
            self._policy.give_up(str(err))
            # The error holds the context until here; what its profile may have queued must not outlive it.
            self._cuda.synchronize(self._stream)
            return False
        captured[number] = CapturedStep(self._cuda, context, stream=self._stream)
        if not self._engine.captures_itself:
            try:
                captured[number].capture()
            except ProviderError as err:
                self._policy.give_up(str(err))
        return True


class ExecutionSlot:
    """A stream with a :class:`BatchRunner` for every selection of profiles that occurred. One caller at a time."""

    def __init__(self, cuda: Cuda, engine: LoadedEngine, policy: CapturePolicy) -> None:
        """Create the stream; the buffers follow with the first batch.

        Raises:
            ProviderError: CUDA refuses.
        """
        self._cuda, self._engine, self._policy = cuda, engine, policy
        self._runners: dict[tuple[int, int], BatchRunner] = {}
        self._stream = cuda.create_stream()

    def runner(self, selection: ProfileSelection, limits: BatchShape) -> BatchRunner:
        """Return what runs the batches of a selection of profiles, up to ``limits``.

        Raises:
            ProviderError: CUDA or TensorRT refuses; the slot can only be closed then.
        """
        key = (selection.prompt, selection.step)
        if key not in self._runners:
            self._runners[key] = BatchRunner(
                self._cuda, self._engine, selection, limits, stream=self._stream, policy=self._policy
            )
        return self._runners[key]

    def close(self) -> None:
        """Wait for the stream and free everything, even when some of it fails; any thread may do it.

        Raises:
            ProviderError: the last thing that failed.
        """
        with contextlib.ExitStack() as resources:
            resources.callback(self._cuda.destroy_stream, self._stream)
            for runner in self._runners.values():
                resources.callback(runner.close)
            resources.callback(self._cuda.synchronize, self._stream)
            resources.callback(self._cuda.make_current)


def _device_memory(cuda: Cuda, size: int, resources: contextlib.ExitStack) -> int:
    address = cuda.malloc(size)
    resources.callback(cuda.free, address)
    return address


def _close_steps(captured: dict[int, CapturedStep], resources: contextlib.ExitStack) -> None:
    for step in captured.values():
        resources.callback(step.close)


def _shrink(entries: "OrderedDict[RunShape, Entry]", limit: int) -> "list[Entry]":
    """Drop the oldest entries beyond a limit and return them."""
    return [entries.popitem(last=False)[1] for _ in range(len(entries) - limit)]
