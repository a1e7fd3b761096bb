from pathlib import Path

import numpy as np
import pytest
from support.small_models import DATA

from gircse.runtime import BundleError, Overflow
from gircse.runtime.tokenization import (
    check_texts,
    format_prompt,
    length_buckets,
    load_tokenizer,
    pad_batch,
    tokenize,
    truncate,
)


def test_prompt_template() -> None:
    assert format_prompt("", "a {text} {instruction}") == "a {text} {instruction}"
    assert format_prompt("Find it", "a {text}") == "Instruct: Find it\nQuery:a {text}"
    assert format_prompt("in {text} braces", "x") == "Instruct: in {text} braces\nQuery:x"


@pytest.mark.parametrize("budget", [1, 10, 24, 1000])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_buckets_hold_every_row_once_within_the_limits(rows: int, budget: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 20, 57).tolist()
    buckets = list(length_buckets(lengths, batch_size=rows, batch_tokens=budget))
    assert sorted(row for bucket in buckets for row in bucket) == list(range(57))
    for bucket in buckets:
        assert len(bucket) <= rows
        assert len(bucket) == 1 or len(bucket) * max(lengths[row] for row in bucket) <= budget


def test_buckets_put_like_lengths_together() -> None:
    assert list(length_buckets([1, 9, 2, 8], batch_size=2, batch_tokens=100)) == [(1, 3), (2, 0)]


def test_padding_is_on_the_left() -> None:
    batch = pad_batch((2, 0), [[5], [9], [6, 7, 8]], pad_token_id=1)
    np.testing.assert_array_equal(batch.input_ids, [[6, 7, 8], [1, 1, 5]])
    np.testing.assert_array_equal(batch.attention_mask, [[1, 1, 1], [0, 0, 1]])
    assert batch.input_ids.dtype == batch.attention_mask.dtype == np.int64


def test_truncation_cuts_on_the_right_and_counts() -> None:
    assert truncate([[1, 2, 3], [4]], max_tokens=2, on_overflow=Overflow.TRUNCATE) == ([[1, 2], [4]], 1)
    with pytest.raises(ValueError, match=r"texts\[0\]: 3 tokens .* at most 2 tokens"):
        truncate([[1, 2, 3], [4]], max_tokens=2, on_overflow=Overflow.ERROR)


def test_tokenizer_adds_nothing_and_empty_prompts_get_a_token() -> None:
    tokenizer = load_tokenizer(DATA / "tokenizer.json")
    ids = tokenize(tokenizer, ["", "the model", "the model"], empty_token_id=0)
    assert ids[0] == [0]
    assert ids[1] == ids[2] == tokenizer.encode("the model", add_special_tokens=False).ids


def test_a_tokenizers_own_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(DATA / "tokenizer.json")
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenize(loaded, ["one two three"], empty_token_id=0) == tokenize(
        load_tokenizer(DATA / "tokenizer.json"), ["one two three"], empty_token_id=0
    )


def test_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: .* \| a tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("texts", "error", "match"),
    [
        ("a bare string", TypeError, r"texts: one str \| a sequence"),
        (["fine", None], TypeError, r"texts\[1\]: NoneType"),
        ([b"bytes"], TypeError, r"texts\[0\]: bytes"),
        (["fine", "fine", "\ud800"], ValueError, r"texts\[2\]: .*surrogates"),
    ],
)
def test_bad_texts_are_named(texts: list[str], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        check_texts(texts)
