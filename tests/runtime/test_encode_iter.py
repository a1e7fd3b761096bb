"""``Embedder.encode_iter``: the vectors of ``encode``, in order, and never more texts in memory than a window."""

import logging
from collections.abc import Iterator

import numpy as np
import pytest
from support.small_models import SmallModels
from support.tolerances import BATCH_MAX_DIFFERENCE

from gircse.runtime import Embedder, OptionError

TEXTS = [f"{'word ' * (number * 7 % 11)}{number}" for number in range(50)]


@pytest.fixture(scope="module")
def embedder(small_models: SmallModels) -> Embedder:
    return Embedder(small_models.bundle("qwen2"), threads=2)


@pytest.mark.parametrize("window", [1, 7, 50, 99])
def test_windows_are_the_vectors_of_encode_in_order(embedder: Embedder, window: int) -> None:
    windows = list(embedder.encode_iter(iter(TEXTS), window=window, batch_size=4))
    assert [len(vectors) for vectors in windows] == [len(TEXTS[at : at + window]) for at in range(0, 50, window)]
    found, wanted = np.concatenate(windows), embedder.encode(TEXTS, batch_size=4)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < BATCH_MAX_DIFFERENCE
    if window >= 50:  # the same batches, so the same bits
        np.testing.assert_array_equal(found, wanted)


def test_other_arguments_are_those_of_encode(embedder: Embedder) -> None:
    arguments = {"instruction": "Find", "steps": 3, "all_steps": True}
    (found,) = embedder.encode_iter(TEXTS, **arguments)
    np.testing.assert_array_equal(found, embedder.encode(TEXTS, **arguments))
    (prompted,) = embedder.encode_iter(TEXTS, prompt="query: ", batch_tokens=64)
    np.testing.assert_array_equal(prompted, embedder.encode(TEXTS, prompt="query: ", batch_tokens=64))


def test_no_texts_give_no_windows(embedder: Embedder) -> None:
    assert list(embedder.encode_iter([])) == []


@pytest.mark.parametrize(("window", "ahead"), [(5, 5), (None, 96)])
def test_texts_are_read_one_window_ahead(embedder: Embedder, window: int | None, ahead: int) -> None:
    """A million texts would take hours, and memory if they were read first."""
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while read < 1_000_000:
            read += 1
            yield "ok"

    windows = embedder.encode_iter(endless(), window=window, batch_size=3)  # by default 32 batches of 3
    assert read == 0
    for number in range(1, 4):
        assert len(next(windows)) == ahead
        assert read == number * ahead


def test_truncation_is_reported_once(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    long = "word " * 200
    with caplog.at_level(logging.WARNING):
        windows = embedder.encode_iter([long, "ok", long, "ok", long], window=2)
        next(windows)
        assert caplog.records == []
        list(windows)
    assert [record.getMessage() for record in caplog.records] == ["3 of 5 texts were cut to 48 tokens"]


def test_errors_name_the_text_by_its_place_in_the_whole(embedder: Embedder) -> None:
    windows = embedder.encode_iter(["ok"] * 5 + [None], window=2)
    next(windows), next(windows)
    with pytest.raises(TypeError, match=r"^texts\[5\] has type NoneType; "):
        next(windows)
    with pytest.raises(OptionError, match=r"^texts\[3\] has \d+ tokens; "):
        list(embedder.encode_iter(["ok"] * 3 + ["word " * 200], window=2, on_overflow="error"))


def test_wrong_arguments_show_at_once(embedder: Embedder) -> None:
    with pytest.raises(OptionError, match=r"^window is 0; it has to be at least 1\."):
        embedder.encode_iter(TEXTS, window=0)
    with pytest.raises(OptionError, match=r"^steps is 6; "):
        embedder.encode_iter(TEXTS, steps=6)
    with pytest.raises(TypeError, match=r"^texts is one string; "):
        embedder.encode_iter("one text")


def test_progress_counts_texts(embedder: Embedder, capsys: pytest.CaptureFixture[str]) -> None:
    list(embedder.encode_iter(TEXTS, window=20, show_progress=True))
    assert "50/50" in capsys.readouterr().err
    list(embedder.encode_iter(iter(TEXTS), window=20, show_progress=True))
    assert "50text" in capsys.readouterr().err
