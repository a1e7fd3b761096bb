"""Requests that are embedded together: groups of the same options, and errors that stay with their request."""

from typing import Any

import numpy as np
import pytest
from support.tolerances import BATCH_MAX_DIFFERENCE

from gircse.runtime import Embedder, OptionError
from gircse.serving.triton_server.request_batch import EmbedOptions, RequestBatch, TextRequest

PLAIN, SHORT, ASKED = EmbedOptions(5, ""), EmbedOptions(2, ""), EmbedOptions(5, "Find the card")


class Counted:
    """An embedder that remembers how many texts each call had, and fails where one of them is ``broken``."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder, self.embedding_dimension = embedder, embedder.embedding_dimension
        self.calls: list[int] = []

    def encode(self, texts: list[str], **options: Any) -> Any:
        self.calls.append(len(texts))
        if "broken" in texts:
            raise RuntimeError("no memory")
        return self._embedder.encode(texts, **options)


@pytest.fixture
def counted(embedder: Embedder) -> Any:
    return Counted(embedder)


def embed(counted: Any, *requests: TextRequest) -> list[Any]:
    return RequestBatch(counted, requests, batch_size=8).embed()


def request(*texts: str, options: EmbedOptions = PLAIN) -> TextRequest:
    return TextRequest(texts, [options] * len(texts))


def test_what_asks_for_the_same_is_one_call(counted: Any, embedder: Embedder) -> None:
    answers = embed(
        counted,
        request("a", "b"),
        request("c", options=SHORT),
        TextRequest(["d", "e", "f"], [ASKED, PLAIN, SHORT]),
        request("g", options=ASKED),
    )
    assert sorted(counted.calls) == [2, 2, 3]
    expected = [
        embedder.encode(["a", "b"]),
        embedder.encode(["c"], steps=2),
        [
            embedder.encode("d", instruction="Find the card"),
            embedder.encode("e"),
            embedder.encode("f", steps=2),
        ],
        embedder.encode(["g"], instruction="Find the card"),
    ]
    for answer, vectors in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer, vectors, atol=BATCH_MAX_DIFFERENCE)


def test_an_error_stays_with_its_request(counted: Any, embedder: Embedder) -> None:
    one, failed, two, wrong = embed(
        counted, request("a"), request("b", "broken"), request("c", "d"), request("e", options=EmbedOptions(99, ""))
    )
    assert isinstance(failed, RuntimeError)
    assert isinstance(wrong, OptionError)
    np.testing.assert_allclose(np.concatenate([one, two]), embedder.encode(["a", "c", "d"]), atol=BATCH_MAX_DIFFERENCE)


def test_a_request_fails_as_a_whole(counted: Any) -> None:
    (answer,) = embed(counted, TextRequest(["a", "b"], [PLAIN, EmbedOptions(-1, "")]))
    assert isinstance(answer, OptionError)


def test_nothing(counted: Any) -> None:
    assert embed(counted) == []
