"""Continuous batching: texts of whatever requests wait are embedded together.

No timer collects them. While a batch runs, requests arrive, and the next batch takes what is there; a request that
finds the server idle runs at once.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from gircse.runtime import Embedder
from gircse.runtime.batch_planner import DEFAULT_BATCH_TOKENS, PASS_TOKENS
from gircse.runtime.numerics import Float32

DEFAULT_QUEUE_TOKENS = 1 << 17

MAX_TEXTS = 64
"""Texts of a batch: more make it no faster a text, and those that wait wait longer."""

STEP_TOKENS = 2
"""Tokens that a step of a text costs as much as, for its own pass and its vocabulary. Of the demo in INT8 on two cores:
9 ms for the eight steps of a text, 0.48 ms a token."""

LONG_TEXT = 128
"""Tokens of a text beside whose batch short ones may run: in common batches they would wait for it."""

SHORT_SHARE = 1 / 4
"""Length of these texts and tokens of their batch, as shares of those of the long one."""


class QueueFullError(Exception):
    """As many tokens wait as may.

    Attributes:
        retry_seconds: after how long it is worth to ask again.
    """

    def __init__(self, retry_seconds: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_seconds} s")
        self.retry_seconds = retry_seconds


@dataclass(frozen=True)
class Texts:
    """What a request wants embedded.

    Attributes:
        token_ids: of each text, at least one.
        steps: refinement steps.
        instruction: what every prompt begins with; a batch has one, whose keys and values it computes once.
        instruction_tokens: how many tokens of each prompt that are.
        all_steps: return z_1..z_steps.
    """

    token_ids: Sequence[list[int]]
    steps: int
    instruction: str = ""
    instruction_tokens: int = 0
    all_steps: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.token_ids))


class Embedded(NamedTuple):
    """What a request gets.

    Attributes:
        vectors: (texts, hidden) float32 unit vectors, or (texts, steps, hidden).
        queue_seconds: until a batch took the first of its texts.
        run_seconds: from then until the last of them was done.
    """

    vectors: Float32
    queue_seconds: float
    run_seconds: float


class BatchObserver(Protocol):
    """Is told what a batcher does, from any thread."""

    def queue_changed(self, tokens: int) -> None:
        """So many tokens wait now."""

    def batch_ended(self, texts: int, tokens: int) -> None:
        """A batch of so many texts and tokens, padding included, was embedded."""


@dataclass(eq=False)
class _Request:
    """A request until all of its texts are embedded.

    Attributes:
        waiting: positions of the texts that no batch has taken, the longest last.
        left: how many texts are not embedded.
    """

    texts: Texts
    vectors: Float32
    waiting: list[int]
    left: int
    future: "Future[Embedded]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.perf_counter)
    taken: float | None = None

    def length(self, row: int) -> int:
        return len(self.texts.token_ids[row])

    @property
    def waiting_tokens(self) -> int:
        return sum(map(self.length, self.waiting))


class _Row(NamedTuple):
    request: _Request
    row: int

    @property
    def length(self) -> int:
        return self.request.length(self.row)


class Batcher:
    """Embeds the texts of many requests in common batches, on one session.

    One worker thread takes any text. While it is at long ones, a second thread runs batches of short ones beside it, so
    that these need not wait for its end. A request goes to the end of the queue whenever a batch took texts of it, so
    that a large one holds nobody up.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        queue_tokens: int = DEFAULT_QUEUE_TOKENS,
        observer: BatchObserver | None = None,
    ) -> None:
        """Start the workers.

        Args:
            embedder: runs the batches; closed by its owner, after the batcher.
            batch_tokens: most tokens of a batch, padding included; a text that has more is a batch of its own.
            queue_tokens: most tokens that may wait.
            observer: is told of the queue and of batches.
        """
        self._embedder, self._batch_tokens, self._observer = embedder, batch_tokens, observer
        self.queue_tokens = queue_tokens
        self._changed = threading.Condition()  # guards all below
        self._queue: deque[_Request] = deque()
        self._waiting_tokens = 0
        self._seconds_a_token = 0.0
        self._running: list[_Row] = []  # of the first worker
        self._closed = False
        self._workers = [
            threading.Thread(target=self._work, args=[short], name=name, daemon=True)
            for name, short in (("batches", False), ("short batches", True))
        ]
        for worker in self._workers:
            worker.start()

    def submit(self, texts: Texts) -> "Future[Embedded]":
        """Queue the texts of a request. Whoever cancels the future takes them out again.

        Raises:
            QueueFullError: too many tokens would wait.
        """
        by_length = sorted(range(len(texts.token_ids)), key=lambda row: len(texts.token_ids[row]))
        hidden = self._embedder.embedding_dimension
        shape = (len(by_length), texts.steps, hidden) if texts.all_steps else (len(by_length), hidden)
        request = _Request(texts, np.empty(shape, np.float32), by_length, len(by_length))
        with self._changed:
            if self._waiting_tokens + texts.tokens > self.queue_tokens:
                raise QueueFullError(max(1, round(self._waiting_tokens * self._seconds_a_token)))
            self._queue.append(request)
            self._count(texts.tokens)
            self._changed.notify_all()
        request.future.add_done_callback(lambda _: self._forget(request))
        return request.future

    def close(self) -> None:
        """Embed what waits and end the workers; closing twice does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.join()

    def _count(self, tokens: int) -> None:
        self._waiting_tokens += tokens
        if self._observer is not None:
            self._observer.queue_changed(self._waiting_tokens)

    def _forget(self, request: _Request) -> None:
        """Take out what still waits of a request that was canceled or has failed."""
        with self._changed:
            if request.waiting:
                self._count(-request.waiting_tokens)
                request.waiting.clear()
                self._queue.remove(request)

    def _work(self, short: bool) -> None:
        while batch := self._next_batch(short):
            begun = time.perf_counter()
            error = None
            try:
                self._embed(batch)
            except Exception as err:  # whatever it is, it belongs to these requests, and the worker goes on
                error = err
            seconds = time.perf_counter() - begun
            with self._changed:
                if not short:
                    self._running = []
                self._seconds_a_token = seconds / sum(row.length for row in batch)
                for request in dict.fromkeys(row.request for row in batch):
                    self._settle(request, sum(row.request is request for row in batch), error)
            if self._observer is not None and error is None:
                self._observer.batch_ended(len(batch), _padded(batch))

    def _next_batch(self, short: bool) -> list[_Row]:
        """Wait for a batch and take it; nothing when the batcher was closed and all is done."""
        with self._changed:
            while True:
                batch = self._take(short)
                if batch:
                    if not short:
                        self._running = batch
                        self._changed.notify_all()  # what is short beside it need not wait
                    return batch
                if self._closed and not self._queue:
                    return []
                self._changed.wait()

    def _take(self, short: bool) -> list[_Row]:
        """Take a text of the request whose turn it is, its longest, and those nearest to it in length."""
        most_tokens, longest = self._batch_tokens, sys.maxsize
        if short:
            beside = max((row.length for row in self._running), default=0)
            if beside < LONG_TEXT:
                return []
            most_tokens, longest = int(SHORT_SHARE * _padded(self._running)), int(SHORT_SHARE * beside)
        waiting = [
            _Row(request, row) for request in self._queue for row in request.waiting if request.length(row) <= longest
        ]
        if not waiting:
            return []
        turn = waiting[0].request
        first = max((row for row in waiting if row.request is turn), key=lambda row: row.length)
        alike = [row for row in waiting if _together(row.request.texts, turn.texts) and row != first]
        alike.sort(key=lambda row: abs(row.length - first.length))  # in turn where they are as near
        batch = _filled(first, alike, most_tokens=most_tokens)
        self._remove(batch)
        return batch

    def _remove(self, batch: Sequence[_Row]) -> None:
        """Take rows out of the queue; what their requests still have goes to its end."""
        now = time.perf_counter()
        for request in dict.fromkeys(row.request for row in batch):
            taken = {row.row for row in batch if row.request is request}
            request.waiting = [row for row in request.waiting if row not in taken]
            request.taken = request.taken or now
            self._queue.remove(request)
            if request.waiting:
                self._queue.append(request)
        self._count(-sum(row.length for row in batch))

    def _embed(self, batch: Sequence[_Row]) -> None:
        """Embed a batch and write the vectors into the arrays of its requests."""
        texts = batch[0].request.texts
        outputs = self._embedder.run_batch(
            [row.request.texts.token_ids[row.row] for row in batch],
            steps=texts.steps,
            instruction_tokens=min(row.request.texts.instruction_tokens for row in batch),
        )
        for at, (request, row) in enumerate(batch):
            steps = outputs.step_embeddings[at]
            last = steps[-1] if texts.steps else outputs.prompt_embedding[at]
            request.vectors[row] = steps if request.texts.all_steps else last

    def _settle(self, request: _Request, done: int, error: Exception | None) -> None:
        """Count texts that were embedded, and hand over the vectors with the last of them, or the error."""
        request.left -= done
        if (request.left and error is None) or request.future.done():
            return
        if not request.future.set_running_or_notify_cancel():
            return
        if error is not None:
            request.future.set_exception(error)
        else:
            taken = request.taken or request.arrived
            waited, ran = taken - request.arrived, time.perf_counter() - taken
            request.future.set_result(Embedded(request.vectors, waited, ran))


def _together(one: Texts, other: Texts) -> bool:
    """Return whether two requests can share a batch."""
    return (one.steps, one.instruction) == (other.steps, other.instruction)


def _padded(batch: Sequence[_Row]) -> int:
    return len(batch) * max((row.length for row in batch), default=0)


def _filled(first: _Row, others: Sequence[_Row], *, most_tokens: int) -> list[_Row]:
    """Return the rows of a batch: the first, and of the others, the nearest coming first, as many as pay.

    What counts is how much of a batch's time is not spent on padding, nor on reading the weights once more.
    """
    passes = first.request.texts.steps + 1
    steps = STEP_TOKENS * first.request.texts.steps
    tokens, longest, best, best_share = 0, 0, 1, 0.0
    batch = [first, *others[: MAX_TEXTS - 1]]
    for texts, row in enumerate(batch, start=1):
        tokens, longest = tokens + row.length, max(longest, row.length)
        if texts > 1 and texts * longest > most_tokens:
            break
        share = (texts * steps + tokens) / (PASS_TOKENS * passes + texts * (steps + longest))
        if share >= best_share:
            best, best_share = texts, share
    return batch[:best]
