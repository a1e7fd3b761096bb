"""TensorRT sessions for both layouts, with ``tensorrt`` or ``tensorrt_rtx``. Safe to call from several threads.

A run takes an idle execution slot (stream, contexts, buffers) or opens a new one, and gives it back; so there are as
many slots as there ever were concurrent callers. The arrays that a run returns are copies, not views of pinned memory.
"""

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import OptionError, ProviderError, sentence
from gircse.runtime.numerics import Int64
from gircse.runtime.prefix_cache import KeysAndValues
from gircse.runtime.session import StepOutputs
from gircse.runtime.tensor_names import ATTENTION_MASK, INPUT_IDS
from gircse.runtime.trt.cuda import Cuda
from gircse.runtime.trt.engine import LoadedEngine, load_engine
from gircse.runtime.trt.engine_manifest import EngineManifest
from gircse.runtime.trt.execution_slot import BatchRunner, CapturePolicy, ExecutionSlot
from gircse.runtime.trt.profile_selection import ProfileSelection, ProfileSelector

logger = logging.getLogger(__name__)

GRAPH_SHAPES = 8
"""Batch shapes whose CUDA graphs an execution slot keeps; each has one context and one graph per pass."""


class TensorRtSession:
    """Runs batches through one engine; a context manager that frees the GPU's memory at its end.

    Attributes:
        on_gpu: it is.
        takes_prefixes: of the stepwise layout, unless a profile has a minimum of texts or tokens.
    """

    on_gpu = True

    def __init__(self, engine: LoadedEngine, *, cuda: Cuda, graph_shapes: int) -> None:
        """Take a loaded engine; :func:`open_tensorrt_session` makes it."""
        self._steps = engine.memory.facts.steps
        self._cuda = cuda
        self._selector = ProfileSelector(engine.manifest, engine.memory, engine.build_command)
        self.takes_prefixes = self._selector.takes_prefixes
        self._select = functools.lru_cache(maxsize=1024)(self._selector.select)  # hundreds of inputs to compare
        self._slots = _SlotPool(functools.partial(ExecutionSlot, cuda, engine, CapturePolicy(graph_shapes)))
        # The pool knows nothing of the session, so a session that is dropped without close() frees the device too.
        self._finalizer = weakref.finalize(self, self._slots.close)

    def max_batch(self, tokens: int) -> int:
        """Return the largest batch of prompts that are ``tokens`` wide; 0 when no profile takes such a width."""
        return self._selector.max_batch(tokens)

    def run(self, input_ids: Int64, attention_mask: Int64, *, steps: int) -> StepOutputs:
        """Embed one batch; a width below the profile's minimum is padded.

        Args:
            input_ids: (batch, tokens) int64.
            attention_mask: (batch, tokens) int64, 1 for a real token.
            steps: refinement steps, 0..K.

        Returns:
            New arrays, as in :class:`StepOutputs`.

        Raises:
            OptionError: wrong types or shapes, a batch that no profile takes, or too many steps.
            ValueError: the session is closed.
            ProviderError: CUDA or TensorRT fails.
        """
        return self.run_after((), input_ids, attention_mask, steps=steps)

    def run_after(self, prefix: KeysAndValues, input_ids: Int64, attention_mask: Int64, *, steps: int) -> StepOutputs:
        """Embed one batch of prompts that begin with what ``compute_prefix`` was given; the arrays hold the rest.

        The errors are those of ``run``.
        """
        _check_batch(input_ids, attention_mask)
        if not 0 <= steps <= self._steps:
            raise OptionError("steps", f"is {steps}", f"the engine was built for 0..{self._steps}")
        before = prefix[0].shape[1] if prefix else 0
        selection = self._select(*input_ids.shape, before)
        padding = selection.tokens - input_ids.shape[1]
        ids = np.pad(input_ids, ((0, 0), (0, padding)))
        mask = np.pad(np.pad(attention_mask, ((0, 0), (0, padding))), ((0, 0), (before, 0)), constant_values=1)
        with self._runner(selection) as runner:
            return runner.run(ids, mask, steps=steps, prefix=prefix)

    def compute_prefix(self, token_ids: Sequence[int]) -> KeysAndValues:
        """Return the bytes of keys and values, (1, tokens, bytes of a token) uint8, of the beginning of a prompt.

        Raises:
            OptionError: no profile takes it; ``takes_prefixes`` is for prefixes of prompts that one takes.
            ProviderError: CUDA or TensorRT fails.
        """
        with self._runner(self._select(1, len(token_ids))) as runner:
            return runner.compute_prefix(np.array([token_ids], np.int64))

    @contextlib.contextmanager
    def _runner(self, selection: ProfileSelection) -> Iterator[BatchRunner]:
        """Take a slot, and give it back afterwards."""
        self._cuda.make_current()
        slot = self._slots.take()
        try:
            yield slot.runner(selection, self._selector.limits(selection))
        except BaseException:
            _close(slot)  # its stream may still be busy, or be lost
            raise
        self._slots.give_back(slot)

    def close(self) -> None:
        """Free what is idle and the engine; a running call frees its slot at its end. Closing twice does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _SlotPool:
    """The idle slots of a session, and how to make more; once closed, nothing here keeps the engine alive."""

    def __init__(self, new_slot: Callable[[], ExecutionSlot]) -> None:
        self._new_slot: Callable[[], ExecutionSlot] | None = new_slot
        self._lock = threading.Lock()
        self._idle: list[ExecutionSlot] = []

    def take(self) -> ExecutionSlot:
        """Return an idle slot, the one used last, or a new one; it is the caller's until given back."""
        with self._lock:
            new_slot = self._new_slot
            if new_slot is None:
                raise ValueError(sentence("the TensorRT session", "is closed", None, "Open the bundle again."))
            slot = self._idle.pop() if self._idle else None
        return slot or new_slot()

    def give_back(self, slot: ExecutionSlot) -> None:
        """Take a slot whose stream is idle, for the next run; close it when the session was closed meanwhile."""
        with self._lock:
            if self._new_slot is not None:
                self._idle.append(slot)
                return
        _close(slot)

    def close(self) -> None:
        """Close the idle slots, and the others as they are given back."""
        with self._lock:
            slots, self._idle, self._new_slot = self._idle, [], None
        for slot in slots:
            _close(slot)


def open_tensorrt_session(
    bundle: Bundle,
    manifest: EngineManifest,
    plan_path: Path,
    *,
    module: Any,
    cuda: Cuda,
    graph_shapes: int = GRAPH_SHAPES,
) -> TensorRtSession:
    """Load an engine of a bundle onto the GPU.

    Args:
        bundle: an opened bundle.
        manifest: the engine's manifest, checked against the bundle and the GPU.
        plan_path: the plan next to it.
        module: ``tensorrt`` or ``tensorrt_rtx``, whichever built the plan.
        cuda: the GPU.
        graph_shapes: batch shapes whose CUDA graphs are kept; 0 captures none.

    Raises:
        BundleError: TensorRT refuses the plan, or it is not the engine that the bundle describes.
        ProviderError: the GPU fails.
    """
    cuda.make_current()
    command = manifest.build_command(bundle.directory, cuda.compute_capability())
    engine = load_engine(plan_path, manifest, bundle.manifest.graph, module=module, build_command=command)
    if manifest.request.weight_streaming:
        engine.stream_weights(cuda, buffer_bytes=ProfileSelector(manifest, engine.memory, command).buffer_bytes())
    return TensorRtSession(engine, cuda=cuda, graph_shapes=0 if engine.streams_weights else graph_shapes)


def _check_batch(input_ids: Int64, attention_mask: Int64) -> None:
    for name, array in ((INPUT_IDS, input_ids), (ATTENTION_MASK, attention_mask)):
        if array.ndim != 2 or array.dtype != np.int64:
            raise OptionError(name, f"has shape {array.shape} and type {array.dtype}", "it is (batch, tokens) int64")
    if input_ids.shape != attention_mask.shape:
        raise OptionError(
            ATTENTION_MASK, f"has shape {attention_mask.shape}", f"{INPUT_IDS} has shape {input_ids.shape}"
        )


def _close(slot: ExecutionSlot) -> None:
    """Close a slot where nobody waits for its errors."""
    try:
        slot.close()
    except ProviderError as err:
        logger.warning("closing an execution slot of TensorRT: %s", err)
