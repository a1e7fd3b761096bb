"""An execution slot: one stream and all that one caller at a time needs to run batches in it.

    host inputs --copy--> pass 0, pass 1, ... pass steps --copy--> host outputs, then one synchronization

The KV cache and the states stay on the device between the passes. A shape that soon repeats is captured: its second run
captures every pass (see :class:`CapturedStep`), and from the third on a pass is one launch.
"""

import contextlib
import logging
from collections import OrderedDict
from typing import TypeVar

from gircse.runtime.errors import ProviderError
from gircse.runtime.numerics import Int64
from gircse.runtime.session import StepOutputs
from gircse.runtime.trt.cuda import Cuda
from gircse.runtime.trt.engine import LoadedEngine
from gircse.runtime.trt.execution_context import BoundContext, CapturedStep
from gircse.runtime.trt.memory_layout import Buffer, StepBindings, aligned
from gircse.runtime.trt.profile_selection import ProfileSelection

logger = logging.getLogger(__name__)

BatchShape = tuple[int, int]
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
        self._seen: OrderedDict[BatchShape, None] = OrderedDict()
        self._captured: OrderedDict[BatchShape, dict[int, CapturedStep]] = OrderedDict()
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

    def run(self, input_ids: Int64, attention_mask: Int64, *, steps: int) -> StepOutputs:
        """Run one batch, (batch, tokens) int64 each, within the limits; the arrays returned are the caller's."""
        cuda, memory = self._cuda, self._engine.memory
        batch, tokens = input_ids.shape
        captured = self._captured_steps((batch, tokens))
        size = memory.write_inputs(self._host_inputs, input_ids, attention_mask, steps=steps)
        cuda.copy_to_device(self._addresses[Buffer.INPUTS], self._host_inputs[:size], self._stream)
        for number in range(memory.pass_count(steps)):
            if captured is None or not self._launch_or_capture(captured, batch, tokens, number):
                self._enqueue(memory.bindings(batch, tokens, number), self._profiles[number > 0])
        results = self._host_outputs[: memory.output_bytes(batch, steps)]
        cuda.copy_to_host(results, self._addresses[Buffer.OUTPUTS], self._stream)
        cuda.synchronize(self._stream)
        return memory.read_outputs(results, batch=batch, steps=steps)

    def close(self) -> None:
        """Free everything; the stream must be idle."""
        with self._resources as resources:
            for captured in _shrink(self._captured, 0):
                _close_steps(captured, resources)

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

    def _captured_steps(self, shape: BatchShape) -> dict[int, CapturedStep] | None:
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

    def _launch_or_capture(self, captured: dict[int, CapturedStep], batch: int, tokens: int, number: int) -> bool:
        """Enqueue a captured pass, or enqueue it and capture it; False when it has to be enqueued plainly."""
        if number in captured:
            captured[number].enqueue()
            return True
        if not self._policy.shapes:
            return False
        try:
            context = self._context(self._profiles[number > 0], for_graph=True)
            context.bind(self._engine.memory.bindings(batch, tokens, number), self._addresses)
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

    def run(
        self, input_ids: Int64, attention_mask: Int64, *, steps: int, selection: ProfileSelection, limits: BatchShape
    ) -> StepOutputs:
        """Run one batch, (batch, tokens) int64 each, padded to ``selection.tokens``.

        Raises:
            ProviderError: CUDA or TensorRT refuses; the slot can only be closed then.
        """
        key = (selection.prompt, selection.step)
        if key not in self._runners:
            self._runners[key] = BatchRunner(
                self._cuda, self._engine, selection, limits, stream=self._stream, policy=self._policy
            )
        return self._runners[key].run(input_ids, attention_mask, steps=steps)

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


def _shrink(entries: "OrderedDict[BatchShape, Entry]", limit: int) -> "list[Entry]":
    """Drop the oldest entries beyond a limit and return them."""
    return [entries.popitem(last=False)[1] for _ in range(len(entries) - limit)]
