"""One execution context bound to device memory: every TensorRT call that can fail is checked here."""

import contextlib
from collections.abc import Mapping

from gircse.runtime.errors import ProviderError
from gircse.runtime.trt.cuda import Cuda
from gircse.runtime.trt.engine import LoadedEngine
from gircse.runtime.trt.engine_manifest import Shape
from gircse.runtime.trt.memory_layout import Buffer, StepBindings


class BoundContext:
    """An ``IExecutionContext`` on one profile and one stream, which remembers what is bound to it."""

    def __init__(
        self, engine: LoadedEngine, profile: int, *, stream: int, scratch: int, scratch_bytes: int, for_graph: bool
    ) -> None:
        """Create the context.

        Args:
            engine: the engine.
            profile: index of its optimization profile.
            stream: the only stream that the context will run in.
            scratch: device memory for activations; contexts of one stream may share it, as they run one by one.
            scratch_bytes: its size.
            for_graph: see ``LoadedEngine.create_context``.

        Raises:
            ProviderError: TensorRT refuses.
        """
        self._engine, self._stream = engine, stream
        self._context = engine.create_context(for_graph=for_graph)
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        selected = False
        with contextlib.suppress(RuntimeError):  # which the bindings raise here, where other calls return False
            selected = self._context.set_optimization_profile_async(profile, stream)
        if not selected:
            raise engine.failure(f"optimization profile {profile}", "is refused")
        self._context.set_device_memory(scratch, scratch_bytes)

    def bind(self, bindings: StepBindings, addresses: Mapping[Buffer, int]) -> None:
        """Set what differs from the last pass.

        Args:
            bindings: of the pass.
            addresses: where the buffers lie on the device.

        Raises:
            ProviderError: TensorRT refuses a shape or an address, or derives other output shapes.
        """
        for name, shape in bindings.inputs.items():
            if self._shapes.get(name) != shape:
                if not self._context.set_input_shape(name, shape):
                    raise self._engine.failure(f"shape {shape} of {name}", "is refused")
                self._shapes[name] = shape
        for name, place in bindings.places.items():
            address = addresses[place.buffer] + place.offset
            if self._addresses.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    raise self._engine.failure(f"address {address:#x} of {name}", "is refused")
                self._addresses[name] = address
        self._check_outputs(bindings)

    def enqueue(self) -> None:
        """Put the bound pass into the stream.

        Raises:
            ProviderError: TensorRT refuses.
        """
        if not self._context.execute_async_v3(self._stream):
            shapes = f"the input shapes are {self._shapes}"
            raise self._engine.failure("execute_async_v3", "failed", expected=shapes, hint="See TensorRT's log.")

    def _check_outputs(self, bindings: StepBindings) -> None:
        rebuild = f"Build the engine again: {self._engine.build_command}"
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as err:
            shapes = f"the input shapes are {dict(bindings.inputs)}"
            raise ProviderError("infer_shapes", f"failed: {err}", shapes, rebuild) from err
        if missing:
            raise ProviderError("infer_shapes", f"misses the shapes of {', '.join(missing)}", None, rebuild)
        for name, expected in bindings.outputs.items():
            # A larger output would be written past its place.
            found = tuple(self._context.get_tensor_shape(name))
            if found != expected:
                raise ProviderError(name, f"has shape {found}", f"its place holds {expected}", rebuild)


class CapturedStep:
    """A pass that repeats with the same shapes: it has a context of its own and, once captured, a CUDA graph.

    A captured graph stays valid only while nothing is changed in the context that it was captured from. Therefore that
    context serves no other pass. TensorRT for RTX captures and replays on its own as long as nothing is changed.
    """

    def __init__(self, cuda: Cuda, context: BoundContext, *, stream: int) -> None:
        """Enqueue the pass that is bound to the context.

        Args:
            cuda: the device.
            context: kept as long as this object, for what it enqueues may still run.
            stream: its stream.

        Raises:
            ProviderError: TensorRT refuses.
        """
        self._cuda, self._context, self._stream = cuda, context, stream
        self._graph: int | None = None
        context.enqueue()

    def capture(self) -> None:
        """Capture the pass; it stays an ordinary one when that fails.

        The enqueue in the constructor did what TensorRT defers after a change of shapes, which must not be captured.

        Raises:
            ProviderError: TensorRT or CUDA refuses.
        """
        self._cuda.begin_capture(self._stream)
        try:
            self._context.enqueue()
        except BaseException:
            _abandon_capture(self._cuda, self._stream)
            raise
        self._graph = self._cuda.end_capture(self._stream)

    def enqueue(self) -> None:
        """Put the pass into the stream again."""
        if self._graph is None:
            self._context.enqueue()
        else:
            self._cuda.launch_graph(self._graph, self._stream)

    def close(self) -> None:
        """Destroy the graph; the stream must be idle."""
        graph, self._graph = self._graph, None
        if graph is not None:
            self._cuda.destroy_graph(graph)


def _abandon_capture(cuda: Cuda, stream: int) -> None:
    try:
        cuda.destroy_graph(cuda.end_capture(stream))
    except ProviderError:
        return  # an invalidated capture ends with an error and leaves no graph
