"""From texts to padded batches of token ids: prompt template, tokens, truncation, length buckets."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import BundleError

logger = logging.getLogger(__name__)

Int64 = NDArray[np.int64]

PROMPT_TEMPLATE = "Instruct: {instruction}\nQuery:{text}"


class Overflow(StrEnum):
    """What to do with a prompt that is longer than the bundle's ``max_tokens``."""

    TRUNCATE = "truncate"
    ERROR = "error"


@dataclass(frozen=True)
class TokenBatch:
    """Prompts that are embedded together.

    Attributes:
        rows: positions of the prompts in the caller's order.
        input_ids: (batch, tokens) int64, padded on the left.
        attention_mask: (batch, tokens) int64, 1 for a real token.
    """

    rows: tuple[int, ...]
    input_ids: Int64
    attention_mask: Int64


@dataclass(frozen=True)
class PromptTokenizer:
    """Turns texts into the token ids that the graphs see.

    Attributes:
        tokenizer: the model's tokenizer.
        template: the bundle's prompt template.
        pad_token_id: stands for an empty prompt.
        max_tokens: longest prompt.
    """

    tokenizer: Tokenizer
    template: str
    pad_token_id: int
    max_tokens: int

    def __call__(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        prompt: str | None = None,
        on_overflow: Overflow | str = Overflow.TRUNCATE,
    ) -> list[list[int]]:
        """Return the token ids of each text; the arguments are those of ``Embedder.encode``.

        Raises:
            TypeError: ``texts`` is not a sequence of strings.
            ValueError: a text cannot be UTF-8, both ``instruction`` and ``prompt`` are given, or a prompt is too long
                and ``on_overflow`` is ``error``.
        """
        if instruction and prompt is not None:
            raise ValueError(
                f"instruction {instruction!r} and prompt {prompt!r} | one of them | use instruction, which the model "
                "was trained with"
            )
        check_text("instruction", instruction)
        check_text("prompt", prompt or "")
        check_texts(texts)
        prompts = [(prompt or "") + format_prompt(instruction, text, template=self.template) for text in texts]
        token_ids = tokenize(self.tokenizer, prompts, empty_token_id=self.pad_token_id)
        token_ids, cut = truncate(token_ids, max_tokens=self.max_tokens, on_overflow=Overflow(on_overflow))
        if cut:
            logger.warning("%d of %d texts were cut to %d tokens", cut, len(texts), self.max_tokens)
        return token_ids


def open_tokenizer(bundle: Bundle) -> PromptTokenizer:
    """Load the tokenizer of a bundle.

    Raises:
        BundleError: the file cannot be read as a tokenizer.
    """
    manifest = bundle.manifest
    tokenizer = load_tokenizer(bundle.file("tokenizer.json"))
    return PromptTokenizer(tokenizer, manifest.prompt_template, manifest.pad_token_id, manifest.graph.max_tokens)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a ``tokenizer.json`` with its own truncation and padding switched off.

    Raises:
        BundleError: the file cannot be read as a tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as err:  # the library raises plain Exception
        raise BundleError(f"{path}: {err} | a tokenizer.json of Hugging Face tokenizers | replace the file") from err
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def format_prompt(instruction: str, text: str, *, template: str = PROMPT_TEMPLATE) -> str:
    """Put an instruction before a text; without instruction the text stands alone.

    ``str.replace``, not ``str.format``: braces in a text are text.
    """
    if not instruction:
        return text
    before, after = template.split("{text}")
    return before.replace("{instruction}", instruction) + text + after


def check_texts(texts: Sequence[str]) -> None:
    """Refuse anything but a sequence of strings that UTF-8 can hold.

    Raises:
        TypeError: one string instead of a sequence, or an element that is no string.
        ValueError: a string with a lone surrogate.
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"texts: one {type(texts).__name__} | a sequence of str | pass [text]")
    for row, text in enumerate(texts):
        check_text(f"texts[{row}]", text)


def check_text(where: str, text: str) -> None:
    """Refuse anything but a string that UTF-8 can hold; ``where`` names it in the error.

    Raises:
        TypeError: it is no string.
        ValueError: it holds a lone surrogate.
    """
    if not isinstance(text, str):
        raise TypeError(f"{where}: {type(text).__name__} | str | convert or drop it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise ValueError(f"{where}: {err} | text that UTF-8 can hold | repair the string") from err


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], *, empty_token_id: int) -> list[list[int]]:
    """Tokenize prompts without special tokens.

    A prompt of no tokens (an empty text without instruction) becomes the single token ``empty_token_id``, so that
    it has a defined vector.
    """
    encodings = tokenizer.encode_batch_fast(list(prompts), add_special_tokens=False)
    return [encoding.ids or [empty_token_id] for encoding in encodings]


def truncate(token_ids: list[list[int]], *, max_tokens: int, on_overflow: Overflow) -> tuple[list[list[int]], int]:
    """Cut prompts to ``max_tokens`` on the right, as the reference code does.

    Returns:
        The prompts and how many of them were cut.

    Raises:
        ValueError: a prompt is too long and ``on_overflow`` is ``error``.
    """
    too_long = [row for row, ids in enumerate(token_ids) if len(ids) > max_tokens]
    if too_long and on_overflow is Overflow.ERROR:
        row = too_long[0]
        raise ValueError(
            f"texts[{row}]: {len(token_ids[row])} tokens ({len(too_long)} texts are too long) | at most {max_tokens} "
            "tokens, the instruction included | shorten them, or allow truncation with on_overflow='truncate'"
        )
    return [ids[:max_tokens] for ids in token_ids], len(too_long)


def length_buckets(lengths: Sequence[int], *, batch_size: int, batch_tokens: int) -> Iterator[tuple[int, ...]]:
    """Group prompts of like length, longest first, under a row limit and a budget of padded tokens.

    A prompt that alone exceeds the budget is a batch of its own.

    Args:
        lengths: tokens of each prompt.
        batch_size: most prompts of a batch.
        batch_tokens: most tokens of a batch, padding included.

    Yields:
        Positions of the prompts of one batch.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        rows = min(batch_size, max(1, batch_tokens // lengths[order[start]]))
        yield tuple(order[start : start + rows])
        start += rows


def pad_batch(rows: tuple[int, ...], token_ids: Sequence[list[int]], *, pad_token_id: int) -> TokenBatch:
    """Pad the prompts at ``rows`` on the left to the longest of them."""
    longest = max(len(token_ids[row]) for row in rows)
    input_ids = np.full((len(rows), longest), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for i, row in enumerate(rows):
        ids = token_ids[row]
        input_ids[i, longest - len(ids) :] = ids
        attention_mask[i, longest - len(ids) :] = 1
    return TokenBatch(rows, input_ids, attention_mask)


def padded_batches(
    token_ids: Sequence[list[int]], *, pad_token_id: int, batch_size: int, batch_tokens: int
) -> Iterator[TokenBatch]:
    """Group token ids by length and pad each group; the arguments are those of ``length_buckets`` and ``pad_batch``."""
    lengths = [len(ids) for ids in token_ids]
    for rows in length_buckets(lengths, batch_size=batch_size, batch_tokens=batch_tokens):
        yield pad_batch(rows, token_ids, pad_token_id=pad_token_id)
