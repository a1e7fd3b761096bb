"""A simulated TensorRT on the simulated GPU: its engines compute something that numpy can check.

``FakeTensorRt`` stands for the module ``tensorrt`` or ``tensorrt_rtx``; its engines run ``tiny_pass`` on whatever lies
at the bound addresses when the stream is synchronized.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gircse.runtime import tensor_names
from gircse.runtime.manifest import GraphFacts, Layout
from gircse.runtime.session import StepOutputs, step_outputs
from gircse.runtime.trt.engine_manifest import EngineManifest, EngineProfile
from support.fake_cuda import POISON, FakeCuda, Misuse, Operation, require

Array = NDArray[Any]
SCRATCH_BYTES = 1000
STREAMING_BYTES = 700  # more scratch while weights are streamed

CACHE_TYPES: dict[str, Any] = {"FLOAT": np.float32, "HALF": np.float16, "BF16": ml_dtypes.bfloat16}


def tiny_pass(
    facts: GraphFacts, input_ids: Array, hidden: Array | None, mask: Array, past: Sequence[Array]
) -> tuple[Array, list[Array]]:
    """Compute one pass of the stepwise layout; see ``tensor_names`` for the shapes.

    Every number of ids, mask, hidden and past matters, and padding changes nothing.
    """
    rng = np.random.default_rng(11)
    table = rng.normal(size=(facts.vocab_size, facts.hidden_size)).astype(np.float32)
    width = mask.shape[1] - past[0].shape[1]
    new = table[input_ids] if input_ids.shape[1] else np.asarray(hidden)
    assert new.shape == (len(mask), width, facts.hidden_size)
    positions = np.cumsum(mask, axis=1) * mask
    weights = (mask / (1.0 + positions)).astype(np.float32)[:, :, None]
    last = new[np.arange(len(mask)), np.argmax(positions[:, -width:], axis=1)]
    present = []
    state = last @ rng.normal(size=(facts.hidden_size, facts.hidden_size)).astype(np.float32)
    for old in past:
        weight = rng.normal(size=(facts.hidden_size, facts.kv_size)).astype(np.float32)
        back = rng.normal(size=(facts.kv_size, facts.hidden_size)).astype(np.float32)
        present.append(np.concatenate([old, np.cos(new @ weight).astype(old.dtype)], axis=1))
        state = state + (present[-1].astype(np.float32) * weights).sum(1) @ back
    return np.tanh(state / 4).astype(np.float32), present


def tiny_run(facts: GraphFacts, input_ids: Array, mask: Array, *, steps: int, cache_type: str) -> StepOutputs:
    """Run prompt and steps in a plain loop, which every session must agree with."""
    batch = len(mask)
    past = [np.zeros((batch, 0, facts.kv_size), CACHE_TYPES[cache_type]) for _ in range(2 * facts.num_layers)]
    states = []
    for number in range(steps + 1):
        ids = input_ids if number == 0 else input_ids[:, :0]
        ones = np.ones((batch, number), np.int64)
        hidden, past = tiny_pass(
            facts, ids, states[-1][:, None] if states else None, np.concatenate([mask, ones], 1), past
        )
        states.append(hidden)
    return step_outputs(np.stack(states, axis=1), facts.pooling)


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 2
    BF16 = 3
    BOOL = 4


class TensorIOMode(Enum):
    INPUT = 0
    OUTPUT = 1


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class CudaGraphStrategy(Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class Severity(Enum):
    ERROR = 1
    WARNING = 2
    INFO = 3


class ILogger:
    def __init__(self) -> None:
        self.ready = True

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class FakeTensorRt:
    """The module ``tensorrt``, or with ``rtx`` the module ``tensorrt_rtx``.

    Attributes:
        refuse: names of the TensorRT calls that fail from now on, by False or None.
        dtypes, shapes: overrides by tensor name of what the engine reports.
        engines, contexts: every one that was created and is still alive.
        automatic_budget: bytes of weights that TensorRT would leave on the GPU, of 10000 that it can stream.
        refuse_captures: an enqueue that is being captured fails.
        refuse_shapes_from: contexts from this number on refuse every shape.
    """

    __version__ = "11.1.0"
    DataType, TensorIOMode, TensorLocation, ILogger = DataType, TensorIOMode, TensorLocation, ILogger
    ExecutionContextAllocationStrategy, CudaGraphStrategy = ExecutionContextAllocationStrategy, CudaGraphStrategy

    def __init__(
        self,
        cuda: FakeCuda,
        facts: GraphFacts,
        manifest: EngineManifest,
        *,
        cache_type: str = "HALF",
        rtx: bool = False,
    ) -> None:
        self.cuda, self.facts, self.manifest, self.cache_type, self.rtx = cuda, facts, manifest, cache_type, rtx
        self.refuse: set[str] = set()
        self.refuse_captures = False
        self.refuse_shapes_from: int | None = None
        self.dtypes: dict[str, DataType] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.extra_profiles = 0
        self.automatic_budget = 6000
        self.engines: weakref.WeakSet[FakeEngine] = weakref.WeakSet()
        self.contexts: weakref.WeakSet[FakeContext] = weakref.WeakSet()
        self.created = self.enqueued = 0
        self.message: Callable[[str], None] = lambda text: None

    def Runtime(self, logger: ILogger) -> "FakeRuntime":
        require(logger.ready, "ILogger.__init__ was not called")
        return FakeRuntime(self, logger)


class FakeRuntime:
    def __init__(self, module: FakeTensorRt, logger: ILogger) -> None:
        self.module = module
        module.message = lambda text: logger.log(Severity.ERROR, text)

    def deserialize_cuda_engine(self, content: Any) -> "FakeEngine | None":
        if bytes(memoryview(content)) != b"plan":
            self.module.message("magic tag of the plan")
            return None
        return FakeEngine(self.module)


class RuntimeConfig:
    def __init__(self) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy


class FakeEngine:
    def __init__(self, module: FakeTensorRt) -> None:
        self.module = module
        module.engines.add(self)
        self.facts, self.manifest = module.facts, module.manifest
        facts, layers = self.facts, self.facts.num_layers
        self.inputs = [tensor_names.INPUT_IDS, tensor_names.ATTENTION_MASK]
        if self.manifest.layout is Layout.UNROLLED:
            self.outputs = [tensor_names.EMBEDDING, tensor_names.PROMPT_EMBEDDING]
            self.outputs += [tensor_names.STEP_EMBEDDINGS] if facts.steps else []
        else:
            self.inputs += [tensor_names.HIDDEN] if facts.steps else []
            self.inputs += tensor_names.cache_names("past", layers)
            self.outputs = [tensor_names.NEXT_HIDDEN, *tensor_names.cache_names("present", layers)]
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        self.num_optimization_profiles = len(self.manifest.profiles) + module.extra_profiles
        self.streamable_weights_size = self.budget = 10000  # TensorRT streams nothing unless told to

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self.budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, size: int) -> None:
        require(not self.module.contexts, "a weight streaming budget after the first context")
        if "weight_streaming_budget_v2" not in self.module.refuse:
            self.budget = size

    def get_weight_streaming_automatic_budget(self) -> int:
        require(self.manifest.request.weight_streaming, "weight streaming of an engine that was not built for it")
        return self.module.automatic_budget

    def get_tensor_name(self, index: int) -> str:
        return [*self.outputs, *self.inputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> DataType:
        if name in self.module.dtypes:
            return self.module.dtypes[name]
        if name in (tensor_names.INPUT_IDS, tensor_names.ATTENTION_MASK):
            return DataType.INT64
        return DataType[self.module.cache_type] if name.startswith(("past", "present")) else DataType.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.module.shapes:
            return self.module.shapes[name]
        if name in (tensor_names.INPUT_IDS, tensor_names.ATTENTION_MASK):
            return (-1, -1)
        if name == tensor_names.STEP_EMBEDDINGS:
            return (-1, self.facts.steps, self.facts.hidden_size)
        if name in (tensor_names.HIDDEN, tensor_names.NEXT_HIDDEN):
            return (-1, -1 if name == tensor_names.HIDDEN else 1, self.facts.hidden_size)
        return (-1, -1, self.facts.kv_size) if name.startswith(("past", "present")) else (-1, self.facts.hidden_size)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        ranges = self.manifest.profiles[index].shapes[name]
        return [ranges.min, ranges.opt, ranges.max]

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        streaming = STREAMING_BYTES if self.budget < self.streamable_weights_size else 0
        return SCRATCH_BYTES * (1 + index) + streaming

    def create_runtime_config(self) -> RuntimeConfig | None:
        require(self.module.rtx, "runtime configuration of TensorRT, which has no graph strategy")
        return None if "create_runtime_config" in self.module.refuse else RuntimeConfig()

    def create_execution_context(self, argument: Any) -> "FakeContext | None":
        config = argument if self.module.rtx else RuntimeConfig()
        if not self.module.rtx:
            config.set_execution_context_allocation_strategy(argument)
        require(isinstance(config, RuntimeConfig), "create_execution_context without a runtime configuration")
        require(config.strategy is ExecutionContextAllocationStrategy.USER_MANAGED, "TensorRT allocates scratch itself")
        if "create_execution_context" in self.module.refuse:
            return None
        return FakeContext(self, replays=config.cuda_graph_strategy is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE)


class FakeContext:
    """An execution context; ``version`` counts its changes, ``flushed`` is the version that was last enqueued."""

    def __init__(self, engine: FakeEngine, *, replays: bool) -> None:
        self.engine, self.module, self.cuda = engine, engine.module, engine.module.cuda
        self.replays = replays
        self.profile: EngineProfile | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.stream = 0
        self.index = 0
        self.version, self.flushed = 0, -1
        self.module.contexts.add(self)
        self.number = self.module.created
        self.module.created += 1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        require(stream in self.cuda.streams, "set_optimization_profile_async without a stream")
        if "set_optimization_profile_async" in self.module.refuse or index >= len(self.engine.manifest.profiles):
            raise RuntimeError("Error in set optimization profile async.")
        self.profile, self.index, self.stream = self.engine.manifest.profiles[index], index, stream
        self.shapes.clear()
        self.version += 1
        owner = weakref.ref(self)
        self.cuda.push(stream, Operation(lambda: require(owner(), "a context is gone whose profile is being switched")))
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        require(size >= self.engine.get_device_memory_size_for_profile_v2(self.index), "too little scratch")
        self.cuda.view(address, size)
        self.scratch = (address, size)
        self.version += 1

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        require(self.profile is not None, "set_input_shape without a profile")
        require(type(shape) is tuple and all(type(size) is int for size in shape), f"{name}: shape {shape!r}")
        if "set_input_shape" in self.module.refuse or name not in self.engine.inputs:
            return False
        if self.module.refuse_shapes_from is not None and self.number >= self.module.refuse_shapes_from:
            return False
        assert self.profile is not None
        if not self.profile.shapes[name].holds(shape):
            self.module.message(f"{name}: {shape} is not in {self.profile.shapes[name]}")
            return False
        self.shapes[name] = shape
        self.version += 1
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        require(address and address % 256 == 0, f"{name}: address {address:#x}")
        if "set_tensor_address" in self.module.refuse or name not in self.engine.inputs + self.engine.outputs:
            return False
        self.addresses[name] = address
        self.version += 1
        return True

    def infer_shapes(self) -> list[str]:
        if "infer_shapes" in self.module.refuse:
            raise RuntimeError("sizes of a concatenation")
        if "infer_shapes of past" in self.module.refuse:
            return ["past.0.key"]
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if "get_tensor_shape" in self.module.refuse:
            return (1, 2, 3)
        return self.shapes[name] if name in self.engine.inputs else self._output_shape(name)

    def execute_async_v3(self, stream: int) -> bool:
        require(stream == self.stream, "enqueue in another stream than the profile's")
        require(self.profile is not None and self.scratch is not None, "enqueue without profile or scratch")
        require(not self.infer_shapes(), f"enqueue without shapes of {self.infer_shapes()}")
        if "execute_async_v3" in self.module.refuse:
            self.module.message("a kernel failed")
            return False
        shapes = {name: self.get_tensor_shape(name) for name in self.engine.inputs + self.engine.outputs}
        self._check_sizes(shapes)
        self._check_addresses(shapes)
        if self.cuda.capturing(stream):
            require(not self.module.rtx, "capture of TensorRT for RTX, which captures itself")
            require(self.flushed == self.version, "capture before a plain enqueue with the same shapes")
            if self.module.refuse_captures:
                return False
        require(not self.replays or self.flushed in (-1, self.version), "RTX captures the graph anew every time")
        self.flushed = self.version
        self.module.enqueued += 1
        version, owner, addresses = self.version, weakref.ref(self), dict(self.addresses)

        def run() -> None:
            context = owner()
            if context is None:
                raise Misuse("the context of a queued pass is gone")
            require(not replayed or context.version == version, "the context was changed after the capture")
            context.compute(shapes, addresses)

        replayed = self.cuda.capturing(stream)
        self.cuda.push(stream, Operation(run))
        return True

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        """Run on the device's memory."""
        assert self.scratch is not None
        self.cuda.view(*self.scratch)[:] = POISON
        tensors = {name: self._tensor(name, shapes[name], addresses[name]) for name in shapes}
        ids, mask = tensors[tensor_names.INPUT_IDS].copy(), tensors[tensor_names.ATTENTION_MASK].copy()
        require(((0 <= ids) & (ids < self.engine.facts.vocab_size)).all(), "ids that were not copied")
        require(((mask == 0) | (mask == 1)).all(), "a mask that was not copied")
        if self.engine.manifest.layout is Layout.UNROLLED:
            facts = self.engine.facts
            results = tiny_run(facts, ids, mask, steps=facts.steps, cache_type=self.module.cache_type)
            prompt, steps = results.prompt_embedding, results.step_embeddings
            values = {tensor_names.PROMPT_EMBEDDING: prompt, tensor_names.STEP_EMBEDDINGS: steps}
            values[tensor_names.EMBEDDING] = steps[:, -1] if facts.steps else prompt
        else:
            layers = self.engine.facts.num_layers
            past = [tensors[name].copy() for name in tensor_names.cache_names("past", layers)]
            hidden, present = tiny_pass(self.engine.facts, ids, tensors.get(tensor_names.HIDDEN), mask, past)
            values = dict(zip(tensor_names.cache_names("present", layers), present, strict=True))
            values[tensor_names.NEXT_HIDDEN] = hidden[:, None]
        for name in self.engine.outputs:
            tensors[name][...] = values[name]

    def _tensor(self, name: str, shape: tuple[int, ...], address: int) -> Array:
        dtype = np.dtype(CACHE_TYPES.get(self.engine.get_tensor_dtype(name).name, np.int64))
        size = int(np.prod(shape)) * dtype.itemsize
        return self.cuda.view(address, size).view(dtype).reshape(shape)

    def _output_shape(self, name: str) -> tuple[int, ...]:
        batch, total = self.shapes[tensor_names.ATTENTION_MASK]
        facts = self.engine.facts
        if name.startswith("present"):
            return (batch, total, facts.kv_size)
        rows = {tensor_names.STEP_EMBEDDINGS: (facts.steps,), tensor_names.NEXT_HIDDEN: (1,)}
        return (batch, *rows.get(name, ()), facts.hidden_size)

    def _check_sizes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        batch, total = shapes[tensor_names.ATTENTION_MASK]
        require(all(shape[0] == batch for shape in shapes.values()), f"batch of {shapes}")
        if self.engine.manifest.layout is Layout.STEPWISE:
            tokens, past = shapes[tensor_names.INPUT_IDS][1], shapes[tensor_names.cache_names("past", 1)[0]][1]
            soft = shapes.get(tensor_names.HIDDEN, (batch, 0))[1]
            require(soft == (0 if tokens else 1) and past + (tokens or 1) == total, f"sizes of {shapes}")

    def _check_addresses(self, shapes: dict[str, tuple[int, ...]]) -> None:
        assert self.scratch is not None
        missing = [name for name in shapes if name not in self.addresses]
        require(not missing, f"enqueue without addresses of {missing}")
        require(len(set(self.addresses.values())) == len(self.addresses), "two tensors at one address")
        spans = [(self.scratch[0], sum(self.scratch), "scratch")]
        for name, shape in shapes.items():
            start = self.addresses[name]
            spans.append((start, start + self._tensor(name, shape, start).nbytes, name))
        spans.sort()
        for (_, end, name), (start, _, other) in itertools.pairwise(spans):
            require(end <= start, f"{name} and {other} overlap")
