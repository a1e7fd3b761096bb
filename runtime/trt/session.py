"""TensorRT sessions for both layouts, with ``tensorrt`` or ``tensorrt_rtx``. Safe to call from several threads.

A run takes an idle lane (stream, contexts, buffers) or opens a new one, and gives it back; so there are as many lanes
as there ever were callers at once. The arrays that a run returns are the caller's own, no views of pinned memory.
"""

import functools
import logging
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import ProviderError
from gircse.runtime.session import StepOutputs
from gircse.runtime.tensor_names import ATTENTION_MASK, INPUT_IDS
from gircse.runtime.trt.cuda import Cuda
from gircse.runtime.trt.engine import LoadedEngine, load_engine
from gircse.runtime.trt.engine_manifest import EngineManifest
from gircse.runtime.trt.execution_slot import CapturePolicy, ExecutionSlot
from gircse.runtime.trt.memory_layout import Int64
from gircse.runtime.trt.profile_selection import ProfileChooser

logger = logging.getLogger(__name__)

GRAPH_SHAPES = 8
"""Batch shapes whose CUDA graphs are kept in a lane; each has one context and one graph per pass."""


class TensorRtSession:
    """Runs batches through one engine; a context manager that frees the GPU's memory at its end."""

    def __init__(self, engine: LoadedEngine, plan: EngineManifest, *, cuda: Cuda, graph_shapes: int) -> None:
        """Take a loaded engine; :func:`open_tensorrt_session` makes it."""
        self._steps = engine.planner.facts.steps
        self._cuda = cuda
        self._chooser = ProfileChooser(plan, engine.planner)
        self._choose = functools.lru_cache(maxsize=1024)(self._chooser.choose)  # hundreds of inputs to compare
        self._lanes = _SlotPool(functools.partial(ExecutionSlot, cuda, engine, CapturePolicy(graph_shapes)))
        # The pool knows nothing of the session, so a session that is dropped without close() frees the device too.
        self._finalizer = weakref.finalize(self, self._lanes.close)

    def max_batch(self, tokens: int) -> int:
        """Return the largest batch of prompts that are ``tokens`` wide; 0 when no profile takes such a width."""
        return self._chooser.max_batch(tokens)

    def run(self, input_ids: Int64, attention_mask: Int64, *, steps: int) -> StepOutputs:
        """Embed one batch; a width below the smallest of the profile is padded.

        Args:
            input_ids: (batch, tokens) int64.
            attention_mask: (batch, tokens) int64, 1 for a real token.
            steps: refinement steps, 0..K.

        Returns:
            New arrays, as in :class:`StepOutputs`.

        Raises:
            ValueError: wrong types or shapes, a batch that no profile takes, too many steps, or a closed session.
            ProviderError: CUDA or TensorRT fails.
        """
        _check_batch(input_ids, attention_mask)
        if not 0 <= steps <= self._steps:
            raise ValueError(f"steps: {steps} | 0..{self._steps}, which the engine was built for | ask for fewer")
        choice = self._choose(*input_ids.shape)
        self._cuda.make_current()
        lane = self._lanes.take()
        try:
            padding = ((0, 0), (0, choice.tokens - input_ids.shape[1]))
            outputs = lane.run(
                np.pad(input_ids, padding),
                np.pad(attention_mask, padding),
                steps=steps,
                choice=choice,
                limits=self._chooser.limits(choice),
            )
        except BaseException:
            _close(lane)  # its stream may still be busy, or be lost
            raise
        self._lanes.give_back(lane)
        return outputs

    def close(self) -> None:
        """Free what is idle and the engine; a run under way frees its lane at its end. Closing twice does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _SlotPool:
    """The idle lanes of a session, and how to make more; once closed, nothing here keeps the engine alive."""

    def __init__(self, new_lane: Callable[[], ExecutionSlot]) -> None:
        self._new_lane: Callable[[], ExecutionSlot] | None = new_lane
        self._lock = threading.Lock()
        self._idle: list[ExecutionSlot] = []

    def take(self) -> ExecutionSlot:
        """Return an idle lane, the one used last, or a new one; it is the caller's until given back."""
        with self._lock:
            new_lane = self._new_lane
            if new_lane is None:
                raise ValueError("TensorRtSession: run after close | an open session | open the bundle again")
            lane = self._idle.pop() if self._idle else None
        return lane or new_lane()

    def give_back(self, lane: ExecutionSlot) -> None:
        """Take a lane whose stream is idle, for the next run; close it when the session was closed meanwhile."""
        with self._lock:
            if self._new_lane is not None:
                self._idle.append(lane)
                return
        _close(lane)

    def close(self) -> None:
        """Close the idle lanes and all that come back later."""
        with self._lock:
            lanes, self._idle, self._new_lane = self._idle, [], None
        for lane in lanes:
            _close(lane)


def open_tensorrt_session(
    bundle: Bundle, plan: EngineManifest, plan_path: Path, *, module: Any, cuda: Cuda, graph_shapes: int = GRAPH_SHAPES
) -> TensorRtSession:
    """Load an engine of a bundle onto the GPU.

    Args:
        bundle: an opened bundle.
        plan: the engine's JSON, checked against the bundle and the GPU.
        plan_path: the plan beside it.
        module: ``tensorrt`` or ``tensorrt_rtx``, whichever built the plan.
        cuda: the GPU.
        graph_shapes: batch shapes whose CUDA graphs are kept; 0 captures none.

    Raises:
        BundleError: TensorRT refuses the plan, or it is not the engine that the bundle describes.
        ProviderError: the GPU fails.
    """
    cuda.make_current()
    engine = load_engine(plan_path, plan, bundle.manifest.graph, module=module)
    return TensorRtSession(engine, plan, cuda=cuda, graph_shapes=graph_shapes)


def _check_batch(input_ids: Int64, attention_mask: Int64) -> None:
    for name, array in ((INPUT_IDS, input_ids), (ATTENTION_MASK, attention_mask)):
        if array.ndim != 2 or array.dtype != np.int64:
            raise ValueError(
                f"{name}: shape {array.shape} of {array.dtype} | (batch, tokens) of int64 | convert the array"
            )
    if input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"{ATTENTION_MASK}: shape {attention_mask.shape} | that of {INPUT_IDS}, {input_ids.shape} | "
            "give every token its mask"
        )


def _close(lane: ExecutionSlot) -> None:
    """Close a lane where nobody waits for its errors."""
    try:
        lane.close()
    except ProviderError as err:
        logger.warning("closing a TensorRT lane: %s", str(err))
