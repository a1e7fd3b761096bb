"""Read the residual stream between the layers of a TensorRT engine, and replace it, as ``LayerProbe`` does in a graph.

It takes an engine that ``gircse-build --layer-outputs`` made: TensorRT merges layers, so of a value that is no output
nothing is left to read. All values of the one text come back to the host, so the plainest run will do: arrays go to the
device, one pass runs, arrays come back.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gircse.evaluation.parity.layer_trace import LayerTrace
from gircse.runtime import tensor_names
from gircse.runtime.batch_planner import TokenBatch
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import OptionError
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider
from gircse.runtime.tensor_names import FORCE, FORCED
from gircse.runtime.trt.cuda import Cuda, open_cuda
from gircse.runtime.trt.engine import LoadedEngine, load_engine
from gircse.runtime.trt.engine_manifest import Shape, read_engines, select_engine
from gircse.runtime.trt.execution_context import BoundContext
from gircse.runtime.trt.library import MODULES, import_tensorrt
from gircse.runtime.trt.memory_layout import Buffer, MemoryLayout, StepBindings, TensorPlacement, aligned
from gircse.runtime.trt.profile_selection import ProfileSelection, ProfileSelector

Arrays = Mapping[str, Any]

_CACHE_TYPES = {4: np.uint32, 2: np.uint16}
"""The KV cache as bits, by the size of a number: numpy has no BF16, and nobody here computes with it."""

_TYPES = {tensor_names.INPUT_IDS: np.int64, tensor_names.ATTENTION_MASK: np.int64, FORCE: np.bool_}
"""Everything else is float32."""


class EngineProbe:
    """An engine with the values between its layers as outputs."""

    def __init__(self, engine: LoadedEngine, cuda: Cuda) -> None:
        """Take a loaded engine; :func:`open_engine_probe` makes it."""
        self._engine, self._memory, self._cuda = engine, engine.memory, cuda

    def trace(self, batch: TokenBatch, *, forced: LayerTrace | None = None) -> LayerTrace:
        """Run one text; arguments and result are those of ``LayerProbe.trace``.

        Raises:
            OptionError: no profile takes the text.
            ProviderError: CUDA or TensorRT fails.
        """
        tokens, facts = batch.input_ids.shape[1], self._memory.facts
        selection = self._select(tokens)
        past, present = (tensor_names.cache_names(kind, facts.num_layers) for kind in ("past", "present"))
        streams, states = [], []
        kept: dict[str, Any] = {}
        with contextlib.ExitStack() as resources:
            runner = _PassRunner(self._engine, self._cuda, selection, tokens, resources)
            for step in range(facts.steps + 1):
                names = tensor_names.layer_inputs(facts.num_layers, prompt=step == 0, step=step > 0)
                inputs = {tensor_names.ATTENTION_MASK: np.ones((1, tokens + step), np.int64), **kept}
                if step == 0:
                    inputs[tensor_names.INPUT_IDS] = batch.input_ids
                if forced is not None:
                    inputs[FORCE] = np.ones((1, 1, 1), np.bool_)
                    values = zip(names, forced.streams[step], strict=True)
                    inputs |= {name + FORCED: value[None] for name, value in values}
                outputs = runner.run(step, inputs)
                streams.append(np.concatenate([outputs[name] for name in names]))
                states.append(outputs[tensor_names.NEXT_HIDDEN][0])
                kept = {one: outputs[other] for one, other in zip(past, present, strict=True)}
                kept[tensor_names.HIDDEN] = outputs[tensor_names.NEXT_HIDDEN]
        return LayerTrace(streams, np.concatenate(states))

    def _select(self, tokens: int) -> ProfileSelection:
        selection = ProfileSelector(self._engine.manifest, self._memory, self._engine.build_command).select(1, tokens)
        if selection.tokens != tokens:  # padding would be among the values that are compared
            raise OptionError(
                "--locate",
                f"has a text of {tokens} tokens",
                f"the engine with layer outputs takes {selection.tokens} or more",
                f"Build it for shorter ones too; it was built by: {self._engine.build_command}",
            )
        return selection


class _PassRunner:
    """Runs the passes of one text, all values of a pass in two blocks: inputs, outputs."""

    def __init__(
        self,
        engine: LoadedEngine,
        cuda: Cuda,
        selection: ProfileSelection,
        tokens: int,
        resources: contextlib.ExitStack,
    ) -> None:
        """Allocate for the largest pass.

        Args:
            engine: the engine.
            cuda: the device.
            selection: the profiles of the text.
            tokens: of the text.
            resources: frees all, after waiting for the stream.

        Raises:
            ProviderError: out of memory, or TensorRT refuses a profile.
        """
        self._engine, self._memory, self._cuda, self._tokens = engine, engine.memory, cuda, tokens
        self._profiles = (selection.prompt, selection.step)
        cuda.make_current()
        self._stream = cuda.create_stream()
        resources.callback(cuda.destroy_stream, self._stream)
        passes = [self._shapes(step) for step in range(self._memory.last_pass + 1)]
        self._host, self._addresses = {}, {}
        for buffer, index in ((Buffer.INPUTS, 0), (Buffer.OUTPUTS, 1)):
            size = max(_bytes(self._memory, shapes[index]) for shapes in passes)
            self._addresses[buffer] = cuda.malloc(size)
            resources.callback(cuda.free, self._addresses[buffer])
            self._host[buffer] = cuda.malloc_host(size)
            resources.callback(cuda.free_host, self._host[buffer])
        scratch_bytes = aligned(max(map(engine.scratch_bytes, self._profiles)))
        scratch = cuda.malloc(scratch_bytes)
        resources.callback(cuda.free, scratch)
        self._contexts: dict[int, BoundContext] = {}
        resources.callback(self._contexts.clear)
        resources.callback(cuda.synchronize, self._stream)
        for profile in {*self._profiles}:
            self._contexts[profile] = BoundContext(
                engine,
                profile,
                stream=self._stream,
                scratch=scratch,
                scratch_bytes=scratch_bytes,
                for_graph=False,
            )

    def run(self, step: int, given: Arrays) -> dict[str, Any]:
        """Run the prompt (0) or a step and return all outputs; inputs that are not given are zero."""
        cuda, (inputs, outputs) = self._cuda, self._shapes(step)
        places = {**_places(self._memory, Buffer.INPUTS, inputs), **_places(self._memory, Buffer.OUTPUTS, outputs)}
        for name in inputs:
            self._view(places[name], name, inputs[name])[...] = given.get(name, 0)
        cuda.copy_to_device(self._addresses[Buffer.INPUTS], self._host[Buffer.INPUTS], self._stream)
        context = self._contexts[self._profiles[step > 0]]
        context.bind(StepBindings(inputs, outputs, places), self._addresses)
        context.enqueue()
        cuda.copy_to_host(self._host[Buffer.OUTPUTS], self._addresses[Buffer.OUTPUTS], self._stream)
        cuda.synchronize(self._stream)
        return {name: self._view(places[name], name, shape).copy() for name, shape in outputs.items()}

    def _shapes(self, step: int) -> tuple[dict[str, Shape], dict[str, Shape]]:
        return self._memory.input_shapes(1, self._tokens, step), self._memory.output_shapes(1, self._tokens, step)

    def _view(self, place: TensorPlacement, name: str, shape: Shape) -> Any:
        dtype = _dtype(self._memory, name)
        size = int(np.prod(shape)) * dtype.itemsize
        return self._host[place.buffer][place.offset : place.offset + size].view(dtype).reshape(shape)


def _places(memory: MemoryLayout, buffer: Buffer, shapes: Mapping[str, Shape]) -> dict[str, TensorPlacement]:
    places, offset = {}, 0
    for name, shape in shapes.items():
        places[name] = TensorPlacement(buffer, offset)
        offset += _bytes(memory, {name: shape})
    return places


def _bytes(memory: MemoryLayout, shapes: Mapping[str, Shape]) -> int:
    return sum(aligned(int(np.prod(shape)) * _dtype(memory, name).itemsize) for name, shape in shapes.items())


def _dtype(memory: MemoryLayout, name: str) -> np.dtype[Any]:
    if tensor_names.is_cache(name):
        return np.dtype(_CACHE_TYPES[memory.cache_item_bytes])
    return np.dtype(_TYPES.get(name, np.float32))


def has_layer_engine(bundle: Bundle, precision: str, provider: Provider, layout: Layout | None) -> bool:
    """Whether somebody built an engine for this probe, be it that it fits or not.

    Raises:
        BundleError: the manifest of an engine cannot be read.
    """
    return provider in MODULES and any(
        engine.request.layer_outputs
        and (engine.provider, engine.precision) == (provider, precision)
        and layout in (None, engine.layout)
        for engine, _ in read_engines(bundle)
    )


def open_engine_probe(bundle: Bundle, precision: str, provider: Provider) -> EngineProbe:
    """Load the engine of a precision that shows the values between its layers.

    Raises:
        ProviderError: no GPU, no TensorRT, or no engine that fits them.
        BundleError: the engine is damaged.
    """
    module, cuda = import_tensorrt(provider), open_cuda()
    manifest, plan = select_engine(
        bundle,
        provider=provider,
        version=module.__version__,
        capability=cuda.compute_capability(),
        precisions=(precision,),
        layout=Layout.STEPWISE,
        verify=True,
        layer_outputs=True,
    )
    command = manifest.build_command(bundle.directory, cuda.compute_capability())
    engine = load_engine(plan, manifest, bundle.manifest.graph, module=module, build_command=command)
    if manifest.request.weight_streaming:
        engine.stream_weights(cuda, buffer_bytes=ProfileSelector(manifest, engine.memory, command).buffer_bytes())
    return EngineProbe(engine, cuda)
