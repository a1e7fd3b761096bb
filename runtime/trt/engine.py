"""Loads a TensorRT plan and checks that it is the engine that the bundle and the plan's manifest describe.

The module of TensorRT is an argument.
"""

import dataclasses
import logging
import mmap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gircse.runtime.errors import BundleError, ProviderError
from gircse.runtime.manifest import MANIFEST_NAME, GraphFacts
from gircse.runtime.provider import Provider
from gircse.runtime.tensor_names import ATTENTION_MASK, FORCE, INPUT_IDS, cache_names
from gircse.runtime.trt.cuda import MIB, Cuda
from gircse.runtime.trt.engine_manifest import EngineManifest
from gircse.runtime.trt.library import tensorrt_logger
from gircse.runtime.trt.memory_layout import MemoryLayout, aligned

logger = logging.getLogger(__name__)

CACHE_ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2}

SPARE_BYTES = 256 * MIB
"""What streamed weights leave free besides: CUDA loads kernels when they are first used."""

Check = Callable[[str | None, str, object, object], None]
"""Refuses a plan unless found equals expected; takes the part (None: the whole), a verb, found and expected."""


class LoadedEngine:
    """A deserialized engine; makes execution contexts for several threads.

    Attributes:
        manifest: the manifest of its plan.
        memory: what its passes bind.
        build_command: builds it again; for messages.
        streams_weights: whether every pass copies weights from main memory; such a pass cannot be captured.
    """

    def __init__(
        self,
        engine: Any,
        *,
        module: Any,
        messages: Any,
        manifest: EngineManifest,
        memory: MemoryLayout,
        build_command: str,
    ) -> None:
        """Take an ``ICudaEngine`` and what :func:`load_engine` found out about it."""
        self.manifest, self.memory, self.build_command = manifest, memory, build_command
        self.streams_weights = False
        self._engine, self._module, self._messages = engine, module, messages
        self._is_rtx = manifest.provider is Provider.TENSORRT_RTX
        self._lock = threading.Lock()  # TensorRT does not promise that contexts can be created concurrently

    @property
    def captures_itself(self) -> bool:
        """Whether a context made with ``for_graph`` captures and replays CUDA graphs on its own."""
        return self._is_rtx

    def stream_weights(self, cuda: Cuda, *, buffer_bytes: int) -> None:
        """Leave in main memory what the GPU has no room for; before any context is made.

        TensorRT's automatic budget is close to all free memory, because it knows nothing of what its user allocates.

        Args:
            cuda: the device.
            buffer_bytes: device memory that one execution slot needs besides its scratch.

        Raises:
            ProviderError: the slot alone does not fit, or TensorRT does not take the budget.
        """
        self._set_streaming_budget(0)
        scratch = max(aligned(self.scratch_bytes(profile)) for profile in range(len(self.manifest.profiles)))
        free = cuda.memory().free - SPARE_BYTES
        if free < buffer_bytes + scratch:
            raise ProviderError(
                "weight streaming",
                f"finds {(free + SPARE_BYTES) / MIB:.0f} MiB free on the GPU",
                f"the largest batch alone needs {(buffer_bytes + scratch + SPARE_BYTES) / MIB:.0f} MiB",
                f"Free memory of the GPU, or build for smaller batches: {self.build_command}",
            )
        automatic, streamable = (
            self._engine.get_weight_streaming_automatic_budget(),
            self._engine.streamable_weights_size,
        )
        budget = min(automatic, free - buffer_bytes - scratch)
        self._set_streaming_budget(budget)
        self.streams_weights = budget < streamable
        logger.info("weight streaming: %d of %d bytes of weights stay on the GPU", budget, streamable)

    def _set_streaming_budget(self, budget: int) -> None:
        self._engine.weight_streaming_budget_v2 = budget
        if self._engine.weight_streaming_budget_v2 != budget:  # a setter that fails raises nothing
            raise self.failure("weight_streaming_budget_v2", "failed", hint="Free memory of the GPU.")

    def scratch_bytes(self, profile: int) -> int:
        """Return how much device memory a context of a profile needs for its activations."""
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
        if context is None:
            raise self.failure("create_execution_context", "failed", hint="Free memory of the GPU.")
        return context

    def failure(self, where: str, verb: str, *, expected: str | None = None, hint: str | None = None) -> ProviderError:
        """Return the error for a TensorRT call that returned None or False, with the reason that TensorRT logged.

        Args:
            where: the call, or what was set.
            verb: what became of it, such as ``failed``.
            expected: more about the call, as a clause.
            hint: what to do; None is to build the engine again.
        """
        reason = self._messages.drain() or "TensorRT gives no reason"
        return ProviderError(
            where, f"{verb}: {reason}", expected, hint or f"Build the engine again: {self.build_command}"
        )

    def _rtx_config(self, strategy: Any, *, for_graph: bool) -> Any:
        config = self._engine.create_runtime_config()
        if config is None:
            raise self.failure("create_runtime_config", "failed", hint="Reinstall tensorrt-rtx.")
        config.set_execution_context_allocation_strategy(strategy)
        graphs = self._module.CudaGraphStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if for_graph else graphs.DISABLED
        return config


def load_engine(
    plan_path: Path, manifest: EngineManifest, facts: GraphFacts, *, module: Any, build_command: str
) -> LoadedEngine:
    """Deserialize a plan.

    Args:
        plan_path: the plan; :mod:`gircse.runtime.trt.engine_manifest` has checked its hash.
        manifest: its manifest.
        facts: what the bundle's graphs compute.
        module: ``tensorrt`` or ``tensorrt_rtx``.
        build_command: builds the plan again; for messages.

    Raises:
        BundleError: TensorRT refuses the plan, or it is not the engine that manifest and facts describe.
    """
    messages = tensorrt_logger(module)
    runtime = module.Runtime(messages)
    hint = f"Build it again: {build_command}"
    # Mapped, not read: a plan of several gigabytes goes to the device without a copy on the heap.
    try:
        with plan_path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = runtime.deserialize_cuda_engine(content)
    except (OSError, ValueError) as err:  # mmap refuses an empty file with ValueError
        raise BundleError(str(plan_path), f"cannot be read: {err}", None, hint) from err
    if engine is None:
        raise BundleError(
            str(plan_path),
            f"is refused by {manifest.provider} {module.__version__}: {messages.drain() or 'it gives no reason'}",
            f"it was built by {manifest.version} for compute capability {', '.join(manifest.compute_capabilities)}",
            hint,
        )

    def check(part: str | None, what: str, found: object, expected: object) -> None:
        if found != expected:
            where = f"{plan_path}: {part}" if part else str(plan_path)
            raise BundleError(where, f"{what} {found}", f"its JSON and {MANIFEST_NAME} say {expected}", hint)

    memory = _check_tensors(engine, facts, manifest, module, check)
    _check_profiles(engine, manifest, memory, check)
    return LoadedEngine(
        engine, module=module, messages=messages, manifest=manifest, memory=memory, build_command=build_command
    )


def _check_tensors(engine: Any, facts: GraphFacts, manifest: EngineManifest, module: Any, check: Check) -> MemoryLayout:
    """Compare names, types, shapes and locations with what the manifest describes; return that."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    modes = {name: engine.get_tensor_mode(name) for name in names}
    memory = MemoryLayout(
        facts, manifest.layout, CACHE_ITEM_BYTES["FLOAT"], layer_outputs=manifest.request.layer_outputs
    )
    # Where the shapes of two batches that differ in every size differ, the dimension must be dynamic.
    small, large = memory.bindings(2, 3, 0), memory.bindings(5, 7, memory.last_pass)
    inputs, outputs = module.TensorIOMode.INPUT, module.TensorIOMode.OUTPUT
    check(None, "has the inputs", sorted(n for n in names if modes[n] == inputs), sorted(small.inputs))
    check(None, "has the outputs", sorted(n for n in names if modes[n] == outputs), sorted(small.outputs))

    cache = {*cache_names("past", facts.num_layers), *cache_names("present", facts.num_layers)} & set(names)
    cache_dtype = engine.get_tensor_dtype(min(cache)).name if cache else "FLOAT"
    if cache_dtype not in CACHE_ITEM_BYTES:
        check(None, "has a KV cache of type", cache_dtype, " or ".join(CACHE_ITEM_BYTES))
    for name in names:
        others = {INPUT_IDS: "INT64", ATTENTION_MASK: "INT64", FORCE: "BOOL"}
        dtype = cache_dtype if name in cache else others.get(name, "FLOAT")
        check(name, "is of type", engine.get_tensor_dtype(name).name, dtype)
        check(name, "lies on", engine.get_tensor_location(name).name, module.TensorLocation.DEVICE.name)
        one, other = (sizes.inputs.get(name) or sizes.outputs[name] for sizes in (small, large))
        found = tuple(engine.get_tensor_shape(name))
        expected = tuple(a if a == b else -1 for a, b in zip(one, other, strict=True))
        # TensorRT may leave more open than it must; BoundContext compares every shape of every pass again.
        if len(found) != len(expected) or any(
            e not in (-1, f) and f != -1 for f, e in zip(found, expected, strict=True)
        ):
            check(name, "has shape", found, expected)
    return dataclasses.replace(memory, cache_item_bytes=CACHE_ITEM_BYTES[cache_dtype])


def _check_profiles(engine: Any, manifest: EngineManifest, memory: MemoryLayout, check: Check) -> None:
    names = sorted(memory.input_shapes(1, 1, 0))
    check("the number of optimization profiles", "is", engine.num_optimization_profiles, len(manifest.profiles))
    for index, profile in enumerate(manifest.profiles):
        check(f"profile {profile.name}", "has ranges of", sorted(profile.shapes), names)
        for name in names:
            ranges = profile.shapes[name]
            found = [tuple(dims) for dims in engine.get_tensor_profile_shape(name, index)]
            check(f"profile {profile.name}", f"has {name} of", found, [ranges.min, ranges.opt, ranges.max])
