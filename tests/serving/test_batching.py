"""What the batcher puts together, against an embedder that only records batches."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import numpy as np
import pytest

from gircse.runtime.session import StepOutputs
from gircse.serving.batching import MAX_TEXTS, Batcher, Embedded, QueueFullError, Texts

SECONDS = 10


class RecordingEmbedder:
    """Embeds a text as its token ids' sum at every step, and stops before a batch while ``gate`` is closed."""

    embedding_dimension = 2

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.arguments: list[dict[str, Any]] = []
        self.started = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def run_batch(self, token_ids: Sequence[list[int]], **arguments: Any) -> StepOutputs:
        self.batches.append(list(token_ids))
        self.arguments.append(arguments)
        self.started.release()
        if max(map(len, token_ids)) >= 9:  # short batches may pass
            assert self.gate.wait(SECONDS)
        if self.error is not None:
            raise self.error
        sums = np.array([[sum(ids)] * 2 for ids in token_ids], np.float32)
        steps = np.stack([sums + step for step in range(1, arguments["steps"] + 1)] or [sums], axis=1)
        return StepOutputs(sums, steps[:, : arguments["steps"]])


@pytest.fixture
def embedder() -> RecordingEmbedder:
    return RecordingEmbedder()


@pytest.fixture
def batcher(embedder: RecordingEmbedder) -> Iterator[Batcher]:
    batcher = Batcher(embedder, batch_tokens=64, queue_tokens=400)
    yield batcher
    embedder.gate.set()
    batcher.close()


def texts(*lengths: int, steps: int = 2, **more: Any) -> Texts:
    return Texts([list(range(1, length + 1)) for length in lengths], steps, **more)


def vectors(future: "Future[Embedded]") -> list[Any]:
    return future.result(SECONDS).vectors.tolist()


def occupied(batcher: Batcher, embedder: RecordingEmbedder, *, length: int = 60) -> "Future[Embedded]":
    """Make the worker busy with a text until the gate opens."""
    embedder.gate.clear()
    future = batcher.submit(texts(length))
    assert embedder.started.acquire(timeout=SECONDS)
    return future


def test_a_request_gets_the_vectors_of_its_texts_in_their_order(batcher: Batcher) -> None:
    assert vectors(batcher.submit(texts(3, 1, 2))) == [[8, 8], [3, 3], [5, 5]]
    assert vectors(batcher.submit(texts(3, 1, all_steps=True))) == [[[7, 7], [8, 8]], [[2, 2], [3, 3]]]
    assert vectors(batcher.submit(texts(3, 1, steps=0))) == [[6, 6], [1, 1]]


def test_what_waits_is_embedded_together(batcher: Batcher, embedder: RecordingEmbedder) -> None:
    first = occupied(batcher, embedder)
    others = [batcher.submit(texts(length)) for length in (10, 11, 10)]
    embedder.gate.set()
    first.result(SECONDS)
    assert [vectors(other)[0][0] for other in others] == [57, 68, 57]
    assert sorted(map(len, embedder.batches[1])) == [10, 10, 11]


def test_a_batch_has_its_budget_with_padding(batcher: Batcher, embedder: RecordingEmbedder) -> None:
    occupied(batcher, embedder)
    future = batcher.submit(texts(*[16] * 7))
    embedder.gate.set()
    future.result(SECONDS)
    assert [len(batch) for batch in embedder.batches[1:]] == [4, 3]


def test_a_text_over_the_budget_is_a_batch_of_its_own(batcher: Batcher, embedder: RecordingEmbedder) -> None:
    assert vectors(batcher.submit(texts(100, 10))) == [[5052, 5052], [57, 57]]
    assert [list(map(len, batch)) for batch in embedder.batches] == [[100], [10]]


@pytest.mark.parametrize(("short", "batches"), [(2, [3]), (40, [40, 1])], ids=["a few", "many"])
def test_padding_that_costs_more_than_a_batch_is_avoided(
    short: int, batches: list[int], embedder: RecordingEmbedder
) -> None:
    batcher = Batcher(embedder)
    occupied(batcher, embedder)
    futures = [batcher.submit(texts(*[10] * short)), batcher.submit(texts(60))]
    embedder.gate.set()
    for future in futures:
        future.result(SECONDS)
    batcher.close()
    assert [len(batch) for batch in embedder.batches[1:]] == batches


def test_a_large_request_delays_nobody(batcher: Batcher, embedder: RecordingEmbedder) -> None:
    """Its first batch comes first; then it is the turn of the one that came later, whose text fits no batch of it."""
    occupied(batcher, embedder)
    large, late = batcher.submit(texts(*[32] * 6)), batcher.submit(texts(9))
    embedder.gate.set()
    large.result(SECONDS), late.result(SECONDS)
    assert [len(batch[0]) for batch in embedder.batches[1:]] == [32, 9, 32, 32]


def test_a_short_batch_runs_beside_a_long_one(batcher: Batcher, embedder: RecordingEmbedder) -> None:
    long = occupied(batcher, embedder, length=160)
    assert vectors(batcher.submit(texts(4))) == [[12, 12]]
    not_short = batcher.submit(texts(41))
    time.sleep(0.1)
    assert not not_short.done()
    assert not long.done()
    embedder.gate.set()
    not_short.result(SECONDS)


def test_nothing_runs_beside_a_common_batch(batcher: Batcher, embedder: RecordingEmbedder) -> None:
    occupied(batcher, embedder, length=120)
    short = batcher.submit(texts(4))
    time.sleep(0.1)
    assert not short.done()
    embedder.gate.set()
    short.result(SECONDS)


@pytest.mark.parametrize("other", [{"steps": 1}, {"instruction": "find"}])
def test_what_differs_shares_no_batch(other: dict[str, Any], batcher: Batcher, embedder: RecordingEmbedder) -> None:
    occupied(batcher, embedder)
    futures = [batcher.submit(texts(10)), batcher.submit(texts(10, **other)), batcher.submit(texts(10))]
    embedder.gate.set()
    for future in futures:
        future.result(SECONDS)
    assert [len(batch) for batch in embedder.batches[1:]] == [2, 1]


def test_the_instruction_that_a_batch_shares_is_the_shortest(batcher: Batcher, embedder: RecordingEmbedder) -> None:
    occupied(batcher, embedder)
    futures = [batcher.submit(texts(10, instruction="find", instruction_tokens=tokens)) for tokens in (5, 4)]
    embedder.gate.set()
    for future in futures:
        future.result(SECONDS)
    assert embedder.arguments[1]["instruction_tokens"] == 4


def test_a_canceled_request_leaves_the_queue(batcher: Batcher, embedder: RecordingEmbedder) -> None:
    occupied(batcher, embedder)
    canceled, other = batcher.submit(texts(300)), batcher.submit(texts(10))
    assert canceled.cancel()
    batcher.submit(texts(300))  # there is room for it again
    embedder.gate.set()
    other.result(SECONDS)
    batcher.close()
    assert sorted(len(batch[0]) for batch in embedder.batches) == [10, 60, 300]


def test_a_request_may_be_canceled_while_it_is_embedded(batcher: Batcher, embedder: RecordingEmbedder) -> None:
    running = occupied(batcher, embedder)
    assert running.cancel()
    other = batcher.submit(texts(10))
    embedder.gate.set()
    assert vectors(other) == [[57, 57]]
    with pytest.raises(CancelledError):
        running.result()


def test_the_queue_is_limited_in_tokens(batcher: Batcher, embedder: RecordingEmbedder) -> None:
    occupied(batcher, embedder)
    for _ in range(4):
        batcher.submit(texts(50, 50))
    for lengths in ((9,), (9, 9)):  # one text or several
        with pytest.raises(QueueFullError) as refused:
            batcher.submit(texts(*lengths))
        assert refused.value.retry_seconds >= 1


def test_an_error_belongs_to_the_requests_of_its_batch(batcher: Batcher, embedder: RecordingEmbedder) -> None:
    occupied(batcher, embedder)
    embedder.error = MemoryError()
    future = batcher.submit(texts(60, 60, 60))
    embedder.gate.set()
    with pytest.raises(MemoryError):
        future.result(SECONDS)
    embedder.error = None
    assert vectors(batcher.submit(texts(10))) == [[57, 57]]
    assert len(embedder.batches) == 3  # the other two texts of the failed request were dropped


def test_closing_embeds_what_waits(batcher: Batcher, embedder: RecordingEmbedder) -> None:
    occupied(batcher, embedder)
    futures = [batcher.submit(texts(10)) for _ in range(5)]
    embedder.gate.set()
    batcher.close()
    batcher.close()
    assert all(future.done() for future in futures)


def test_many_threads_get_their_own_vectors(batcher: Batcher) -> None:
    wrong: list[int] = []

    def ask(length: int) -> None:
        for _ in range(50):
            if vectors(batcher.submit(texts(length))) != [[length * (length + 1) / 2 + 2] * 2]:
                wrong.append(length)

    threads = [threading.Thread(target=ask, args=[length]) for length in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_batch_has_a_largest_number_of_texts(embedder: RecordingEmbedder) -> None:
    batcher = Batcher(embedder, batch_tokens=1 << 20)
    vectors(batcher.submit(texts(*[1] * (MAX_TEXTS + 1))))
    batcher.close()
    assert [len(batch) for batch in embedder.batches] == [MAX_TEXTS, 1]
