from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_models import DATA

from gircse.runtime import BundleError, OptionError, Overflow
from gircse.runtime.manifest import TruncationSide
from gircse.runtime.tokenization import (
    PromptTokenizer,
    format_prompt,
    iterate_texts,
    load_tokenizer,
    tokenize,
    truncate,
)


def test_prompt_template() -> None:
    assert format_prompt("", "a {text} {instruction}") == "a {text} {instruction}"
    assert format_prompt("Find it", "a {text}") == "Instruct: Find it\nQuery:a {text}"
    assert format_prompt("in {text} braces", "x") == "Instruct: in {text} braces\nQuery:x"


def test_truncation_cuts_on_one_side_and_says_what() -> None:
    assert truncate([[1, 2, 3], [4]], max_tokens=2, on_overflow=Overflow.TRUNCATE) == ([[1, 2], [4]], [0])
    left = truncate([[1, 2, 3], [4]], max_tokens=2, on_overflow=Overflow.TRUNCATE, side=TruncationSide.LEFT)
    assert left == ([[2, 3], [4]], [0])
    with pytest.raises(OptionError, match=r"^texts\[0\] has 3 tokens; the bundle takes at most 2, .* Shorten"):
        truncate([[1, 2, 3], [4]], max_tokens=2, on_overflow=Overflow.ERROR)
    with pytest.raises(OptionError, match=r"^texts\[11\] has 3 tokens, and 1 more of these 3 texts are too long; "):
        truncate([[4], [1, 2, 3], [1, 2, 3]], max_tokens=2, on_overflow=Overflow.ERROR, first_row=10)


def test_tokenizer_adds_nothing_and_empty_prompts_get_a_token() -> None:
    tokenizer = load_tokenizer(DATA / "tokenizer.json")
    ids = tokenize(tokenizer, ["", "the model", "the model"], empty_token_id=0)
    assert ids[0] == [0]
    assert ids[1] == ids[2] == tokenizer.encode("the model", add_special_tokens=False).ids


def test_a_suffix_follows_every_prompt() -> None:
    rust = load_tokenizer(DATA / "tokenizer.json")
    tokenizer = PromptTokenizer(rust, "{instruction}: {text}", 0, 48, prompt_suffix=" the end")
    found = tokenizer(["a text", ""]) + tokenizer(["a text"], instruction="find") + tokenizer(["a text"], prompt="p ")
    prompts = ["a text the end", " the end", "find: a text the end", "p a text the end"]
    assert found == [rust.encode(prompt, add_special_tokens=False).ids for prompt in prompts]


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
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer\.json of Hugging Face tokenizers: "):
        load_tokenizer(tmp_path / "tokenizer.json")


class Frame:
    """Looks like a pandas DataFrame, which iterates the names of its columns."""

    ndim = 2

    def __iter__(self) -> Iterator[str]:
        return iter(["title", "body"])


@pytest.mark.parametrize(
    "texts",
    [
        ["a", "b"],
        ("a", "b"),
        (text for text in "ab"),
        {"a": 1, "b": 2}.keys(),
        np.array(["a", "b"]),
        np.array(["a", "b"], dtype=object),
        np.array(["a"] * 2, dtype=np.dtypes.StringDType()) if hasattr(np.dtypes, "StringDType") else ["a", "a"],
    ],
)
def test_texts_are_any_iterable_of_strings(texts: Any) -> None:
    found = list(iterate_texts(texts))
    assert len(found) == 2
    assert all(isinstance(text, str) for text in found)


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        ("a bare string", r"texts is one string; an iterable of str is expected\. Pass \[text\]\."),
        (b"bytes", r"texts has type bytes; .* Pass \[texts\.decode\(\)\]"),
        (None, r"texts has type NoneType; a str or an iterable of str is expected"),
        (7, r"texts has type int; "),
        ({"title": "a"}, r"texts has type dict; iterating it would embed its keys\. Pass list\(texts\.values\(\)\)"),
        ({"a", "b"}, r"texts has type set; its vectors would have no order\. Pass list\(texts\)\."),
        (frozenset("ab"), r"texts has type frozenset; "),
        (np.array([["a", "b"]]), r"texts has type ndarray and 2 dimensions; one dimension is expected\."),
        (np.array("a"), r"texts has type ndarray and 0 dimensions; "),
        (Frame(), r"texts has type Frame and 2 dimensions; .* Pass one column of it\."),
    ],
)
def test_what_is_not_texts_is_refused(texts: Any, match: str) -> None:
    with pytest.raises(TypeError, match=f"^{match}"):
        iterate_texts(texts)


@pytest.mark.parametrize(
    ("texts", "error", "match"),
    [
        (["fine", None], TypeError, r"^texts\[1\] has type NoneType; a str is expected\."),
        ([b"bytes"], TypeError, r"^texts\[0\] has type bytes; "),
        (["fine", float("nan")], TypeError, r"^texts\[1\] has type float; "),
        (["fine", "fine", "\ud800"], OptionError, r"^texts\[2\] cannot be encoded as UTF-8: .*surrogates"),
    ],
)
def test_bad_texts_are_named(texts: list[Any], error: type[Exception], match: str) -> None:
    tokenizer = PromptTokenizer(load_tokenizer(DATA / "tokenizer.json"), "{instruction}{text}", 0, 48)
    with pytest.raises(error, match=match):
        tokenizer(texts)
    with pytest.raises(error, match=match.replace("[1", "[11").replace("[0", "[10").replace("[2", "[12")):
        tokenizer.tokenize(texts, first_row=10)
