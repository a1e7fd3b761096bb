"""Several batches at once."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.small_models import SmallModels

from gircse.runtime import Embedder, OptionError, ProviderError
from gircse.runtime.batch_runner import BatchRunner
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import Int64
from gircse.runtime.session import StepOutputs

TEXTS = ["the bird", "", "what is a bundle written for", "hello", "ünïcödé 😀", "a text may be long or short"] * 3
IDS = [[1], [2], [3], [4]]
SECONDS = 10


class MeetingSession:
    """Its runs wait until as many are under way, or fail, and take a while; each gives its first token id."""

    def __init__(self, at_once: int, *, seconds: float = 0) -> None:
        self.barrier, self.seconds = threading.Barrier(at_once), seconds
        self.runs: list[int] = []

    def run(self, input_ids: Int64, attention_mask: Int64, *, steps: int) -> StepOutputs:
        token = int(input_ids[0, 0])
        self.runs.append(token)
        try:
            self.barrier.wait(SECONDS)
        except threading.BrokenBarrierError:
            raise ProviderError("run", f"of token {token} was alone") from None
        time.sleep(self.seconds)
        return StepOutputs(np.full((1, 2), token, np.float32), np.empty((1, 0, 2), np.float32))

    def max_batch(self, tokens: int) -> int | None:
        return None

    def close(self) -> None:
        self.barrier.abort()


def tokens_run(runner: BatchRunner, token_ids: Sequence[list[int]] = IDS) -> list[Any]:
    batches = runner.run_batches(token_ids, steps=0, batch_size=1, batch_tokens=99, instruction_tokens=None)
    return [(rows, outputs.embedding.tolist()) for rows, outputs in batches]


@pytest.fixture
def manifest(small_models: SmallModels) -> Any:
    return Bundle.open(small_models.bundle("qwen2")).manifest


@pytest.mark.parametrize("layout", Layout)
def test_vectors_are_those_of_one_stream(small_models: SmallModels, layout: Layout) -> None:
    bundle = small_models.bundle("qwen2")
    with (
        Embedder(bundle, layout=layout, threads=1) as one,
        Embedder(bundle, layout=layout, streams=3) as three,
    ):
        for more in ({}, {"all_steps": True}, {"instruction": "Find the text that answers the question"}):
            wanted, ours = (embedder.encode(TEXTS, batch_size=2, **more) for embedder in (one, three))
            np.testing.assert_array_equal(ours, wanted)
        np.testing.assert_array_equal(three.encode(TEXTS[0]), one.encode(TEXTS[0]))
        assert three.encode([]).shape == (0, 48)
        assert three.self_test().passed


def test_batches_run_at_once_and_come_in_their_order(manifest: Any) -> None:
    runner = BatchRunner(manifest, None, MeetingSession(2), streams=2)
    assert tokens_run(runner) == [((row,), [[token, token]]) for row, (token,) in enumerate(IDS)]


def test_a_gpu_runs_one_at_a_time(manifest: Any) -> None:
    session = MeetingSession(1)
    tokens_run(BatchRunner(manifest, None, session, on_gpu=True, streams=4))
    assert session.runs == [1, 2, 3, 4]


def test_an_error_of_one_ends_the_call(manifest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = MeetingSession(1)

    def run(input_ids: Int64, *_: Any, **__: Any) -> Any:
        session.runs.append(int(input_ids[0, 0]))
        time.sleep(0.02)
        raise ProviderError("run", "failed")

    monkeypatch.setattr(session, "run", run)
    with pytest.raises(ProviderError, match="run failed"):
        tokens_run(BatchRunner(manifest, None, session, streams=2), [[token] for token in range(1, 100)])
    assert len(session.runs) < 50


def test_a_call_that_is_given_up_runs_no_further_batches(manifest: Any) -> None:
    session = MeetingSession(1, seconds=0.02)
    runner = BatchRunner(manifest, None, session, streams=2)
    token_ids = [[token] for token in range(1, 1000)]
    batches = runner.run_batches(token_ids, steps=0, batch_size=1, batch_tokens=99, instruction_tokens=None)
    assert next(batches)[0] == (0,)
    batches.close()
    assert len(session.runs) < 999
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gircse stream")]


def test_streams_are_checked(small_models: SmallModels) -> None:
    with pytest.raises(OptionError, match=r"^streams is 0; it has to be at least 1\."):
        Embedder(small_models.bundle("qwen2"), streams=0)
