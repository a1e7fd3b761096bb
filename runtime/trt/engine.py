"""Loads a TensorRT plan and checks that it is the engine that the bundle and the plan's JSON describe.

The module of TensorRT comes in as an argument.
"""

import mmap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gircse.runtime.errors import BundleError, ProviderError
from gircse.runtime.manifest import MANIFEST_NAME, GraphFacts, Layout
from gircse.runtime.provider import Provider
from gircse.runtime.tensor_names import ATTENTION_MASK, INPUT_IDS
from gircse.runtime.trt.engine_manifest import EngineManifest
from gircse.runtime.trt.library import tensorrt_logger
from gircse.runtime.trt.memory_layout import BufferPlanner

CACHE_ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2}


class LoadedEngine:
    """A deserialized engine; makes execution contexts for several threads.

    Attributes:
        planner: plans its passes.
    """

    def __init__(
        self, engine: Any, *, module: Any, messages: Any, plan: EngineManifest, planner: BufferPlanner
    ) -> None:
        """Take an ``ICudaEngine`` and what :func:`load_engine` found out about it."""
        self.planner = planner
        self._engine, self._module, self._messages = engine, module, messages
        self._is_rtx = plan.provider is Provider.TENSORRT_RTX
        self._lock = threading.Lock()  # TensorRT does not promise that contexts can be created concurrently

    @property
    def captures_itself(self) -> bool:
        """Whether a context made with ``for_graph`` captures and replays CUDA graphs without being told."""
        return self._is_rtx

    def scratch_bytes(self, profile: int) -> int:
        """Return how much device memory a context of a profile wants for its activations."""
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def create_context(self, *, for_graph: bool) -> Any:
        """Return a new ``IExecutionContext`` without memory for activations.

        Args:
            for_graph: the context will run one pass with the same shapes and addresses again and again.

        Raises:
            ProviderError: TensorRT makes none.
        """
        managed = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._lock:
            if self._is_rtx:
                context = self._engine.create_execution_context(self._rtx_config(managed, for_graph=for_graph))
            else:
                context = self._engine.create_execution_context(managed)
        return self.checked(context, "create_execution_context", "an execution context", "free GPU memory")

    def checked(self, result: Any, where: str, expected: str, remedy: str) -> Any:
        """Return the result of a TensorRT call unless it is the None or False that stands for a failure.

        Raises:
            ProviderError: with what TensorRT logged.
        """
        if result is None or result is False:
            raise ProviderError(f"{where}: {self._messages.drain() or result} | {expected} | {remedy}")
        return result

    def _rtx_config(self, strategy: Any, *, for_graph: bool) -> Any:
        config = self._engine.create_runtime_config()
        self.checked(config, "create_runtime_config", "a runtime configuration", "reinstall tensorrt-rtx")
        config.set_execution_context_allocation_strategy(strategy)
        graphs = self._module.CudaGraphStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if for_graph else graphs.DISABLED
        return config


def load_engine(plan_path: Path, plan: EngineManifest, facts: GraphFacts, *, module: Any) -> LoadedEngine:
    """Deserialize a plan.

    Args:
        plan_path: the plan; :mod:`gircse.runtime.trt.engine_manifest` has checked its hash.
        plan: its JSON.
        facts: what the bundle's graphs compute.
        module: ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        BundleError: TensorRT refuses the plan, or it is not the engine that plan and facts describe.
    """
    messages = tensorrt_logger(module)
    runtime = module.Runtime(messages)
    engine = _deserialize(plan_path, runtime)
    if engine is None:
        raise BundleError(
            f"{plan_path}: {messages.drain() or 'TensorRT cannot read it'} | a plan for {plan.provider} "
            f"{module.__version__} on this GPU (it was built by {plan.version} for compute capability "
            f"{', '.join(plan.compute_capabilities)}) | build it again: {plan.command}"
        )

    def refuse(what: str, came: object, expected: object) -> None:
        if came != expected:
            raise BundleError(
                f"{plan_path}: {what} {came} | its JSON and {MANIFEST_NAME} say {expected} | build it again: "
                f"{plan.command}"
            )

    planner = BufferPlanner(facts, plan.layout, _check_tensors(engine, facts, plan.layout, module, refuse))
    _check_profiles(engine, plan, planner, refuse)
    return LoadedEngine(engine, module=module, messages=messages, plan=plan, planner=planner)


def _deserialize(plan_path: Path, runtime: Any) -> Any:
    # Mapped, not read: a plan of several gigabytes goes to the device without a copy on the heap.
    try:
        with plan_path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return runtime.deserialize_cuda_engine(content)
    except (OSError, ValueError) as err:  # mmap refuses an empty file with ValueError
        raise BundleError(f"{plan_path}: {err} | a TensorRT plan | build it again: gircse-build") from err


def _check_tensors(
    engine: Any, facts: GraphFacts, layout: Layout, module: Any, refuse: Callable[[str, object, object], None]
) -> int:
    """Compare names, types, shapes and locations with the layout; return the item size of the KV cache."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {name: engine.get_tensor_mode(name) for name in names}
    planner = BufferPlanner(facts, layout, CACHE_ITEM_BYTES["FLOAT"])
    # Where the shapes of two batches that differ in every size differ, the dimension must be dynamic.
    small, large = planner.plan(2, 3, 0), planner.plan(5, 7, planner.last_pass)
    inputs, outputs = module.TensorIOMode.INPUT, module.TensorIOMode.OUTPUT
    refuse("has inputs", sorted(n for n in names if found[n] == inputs), sorted(small.inputs))
    refuse("has outputs", sorted(n for n in names if found[n] == outputs), sorted(small.outputs))

    cache = {name for name in names if name.startswith(("past.", "present."))}
    cache_dtype = engine.get_tensor_dtype(min(cache)).name if cache else "FLOAT"
    if cache_dtype not in CACHE_ITEM_BYTES:
        refuse("has a KV cache of", cache_dtype, " or ".join(CACHE_ITEM_BYTES))
    for name in names:
        integers = name in (INPUT_IDS, ATTENTION_MASK)
        expected = "INT64" if integers else cache_dtype if name in cache else "FLOAT"
        refuse(f"{name} is of type", engine.get_tensor_dtype(name).name, expected)
        refuse(f"{name} lies on", engine.get_tensor_location(name).name, module.TensorLocation.DEVICE.name)
        one, other = (sizes.inputs.get(name) or sizes.outputs[name] for sizes in (small, large))
        came = tuple(engine.get_tensor_shape(name))
        wanted = tuple(a if a == b else -1 for a, b in zip(one, other, strict=True))
        # TensorRT may leave more open than it must; BoundContext compares every shape of every pass again.
        if len(came) != len(wanted) or any(w not in (-1, c) and c != -1 for c, w in zip(came, wanted, strict=True)):
            refuse(f"{name} has shape", came, wanted)
    return CACHE_ITEM_BYTES[cache_dtype]


def _check_profiles(
    engine: Any, plan: EngineManifest, planner: BufferPlanner, refuse: Callable[[str, object, object], None]
) -> None:
    names = sorted(planner.input_shapes(1, 1, 0))
    refuse("has optimization profiles:", engine.num_optimization_profiles, len(plan.profiles))
    for index, profile in enumerate(plan.profiles):
        refuse(f"profile {profile.name} has ranges of", sorted(profile.shapes), names)
        for name in names:
            ranges = profile.shapes[name]
            came = [tuple(dims) for dims in engine.get_tensor_profile_shape(name, index)]
            refuse(f"profile {profile.name} has {name} of", came, [ranges.min, ranges.opt, ranges.max])
