"""From texts to token ids: prompt template, tokens, truncation."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import BundleError, OptionError, member_of, sentence
from gircse.runtime.manifest import TruncationSide

logger = logging.getLogger(__name__)

PROMPT_TEMPLATE = "Instruct: {instruction}\nQuery:{text}"


class Overflow(StrEnum):
    """What to do with a prompt that is longer than the bundle's ``max_tokens``."""

    TRUNCATE = "truncate"
    ERROR = "error"


@dataclass(frozen=True)
class PromptTokenizer:
    """Turns texts into the token ids that the graphs see.

    Attributes:
        tokenizer: the model's tokenizer.
        template: the bundle's prompt template.
        pad_token_id: stands for an empty prompt.
        max_tokens: longest prompt.
        prompt_suffix: appended to every prompt before it is tokenized.
        truncation_side: where a prompt that is too long is cut.
    """

    tokenizer: Tokenizer
    template: str
    pad_token_id: int
    max_tokens: int
    prompt_suffix: str = ""
    truncation_side: TruncationSide = TruncationSide.RIGHT

    def __call__(
        self,
        texts: Iterable[str],
        *,
        instruction: str = "",
        prompt: str | None = None,
        on_overflow: Overflow | str = Overflow.TRUNCATE,
    ) -> list[list[int]]:
        """Return the token ids of each text, and log how many were cut; the arguments are those of ``Embedder.encode``.

        Raises:
            TypeError: ``texts`` is not an iterable of strings.
            OptionError: see :meth:`tokenize`.
        """
        listed = list(iterate_texts(texts))
        token_ids, cut = self.tokenize(listed, instruction=instruction, prompt=prompt, on_overflow=on_overflow)
        self.log_cut(len(cut), len(listed))
        return token_ids

    def tokenize(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        prompt: str | None = None,
        on_overflow: Overflow | str = Overflow.TRUNCATE,
        first_row: int = 0,
    ) -> tuple[list[list[int]], list[int]]:
        """Return the token ids of each text, and the positions of the texts that were cut.

        Args:
            texts: a sequence of strings.
            instruction: as in ``Embedder.encode``.
            prompt: as in ``Embedder.encode``.
            on_overflow: as in ``Embedder.encode``.
            first_row: number of the first text, for errors.

        Raises:
            TypeError: a text is not a string.
            OptionError: UTF-8 cannot hold a text, both ``instruction`` and ``prompt`` are given, or a prompt is too
                long and ``on_overflow`` is ``error``.
        """
        if instruction and prompt is not None:
            raise OptionError(
                "instruction",
                f"is {instruction!r} and prompt is {prompt!r}",
                "only one of them can be given",
                "Use instruction, which the model was trained with.",
            )
        overflow = member_of(Overflow, "on_overflow", on_overflow)
        check_text("instruction", instruction)
        check_text("prompt", prompt or "")
        for row, text in enumerate(texts, start=first_row):
            check_text(f"texts[{row}]", text)
        prompts = [
            (prompt or "") + format_prompt(instruction, text, template=self.template) + self.prompt_suffix
            for text in texts
        ]
        token_ids = tokenize(self.tokenizer, prompts, empty_token_id=self.pad_token_id)
        return truncate(
            token_ids,
            max_tokens=self.max_tokens,
            side=self.truncation_side,
            on_overflow=overflow,
            first_row=first_row,
        )

    def instruction_tokens(
        self, token_ids: Sequence[list[int]], *, instruction: str = "", prompt: str | None = None
    ) -> int:
        """Return how many tokens of some prompts are those of their instruction or prompt, whatever the texts.

        Args:
            token_ids: what :meth:`tokenize` gave for the same instruction and prompt.
            instruction: as in ``Embedder.encode``.
            prompt: as in ``Embedder.encode``.
        """
        if not token_ids or not (instruction or prompt):
            return 0
        alone, _ = self.tokenize([""], instruction=instruction, prompt=prompt)
        return common_length([*alone, *token_ids])

    def log_cut(self, cut: int, texts: int) -> None:
        """Warn that some of the texts were cut, if any were."""
        if cut:
            logger.warning("%d of %d texts were cut to %d tokens", cut, texts, self.max_tokens)


def open_tokenizer(bundle: Bundle) -> PromptTokenizer:
    """Load the tokenizer of a bundle.

    Raises:
        BundleError: the file cannot be read as a tokenizer.
    """
    manifest = bundle.manifest
    return PromptTokenizer(
        load_tokenizer(bundle.file("tokenizer.json")),
        manifest.prompt_template,
        manifest.pad_token_id,
        manifest.graph.max_tokens,
        prompt_suffix=manifest.prompt_suffix,
        truncation_side=manifest.truncation_side,
    )


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a ``tokenizer.json`` with its own truncation and padding switched off.

    Raises:
        BundleError: the file cannot be read as a tokenizer.
    """
    try:
        return parse_tokenizer(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise BundleError(
            str(path), f"is not a tokenizer.json of Hugging Face tokenizers: {err}", None, "Replace the file."
        ) from err


def parse_tokenizer(content: str) -> Tokenizer:
    """Read the content of a ``tokenizer.json``, with its own truncation and padding switched off.

    Raises:
        ValueError: it is not a tokenizer.
    """
    with _errors_of_tokenizers():
        tokenizer = Tokenizer.from_str(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@contextlib.contextmanager
def _errors_of_tokenizers() -> Iterator[None]:
    """Turn what the library raises into ValueError: plain Exception, and for a panic something outside Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as err:
        raise ValueError(str(err)) from err


def format_prompt(instruction: str, text: str, *, template: str = PROMPT_TEMPLATE) -> str:
    """Put an instruction before a text; without instruction the text is the whole prompt.

    ``str.replace``, not ``str.format``: braces in a text are text.
    """
    if not instruction:
        return text
    before, after = template.split("{text}")
    return before.replace("{instruction}", instruction) + text + after


def iterate_texts(texts: Any) -> Iterator[str]:
    """Return an iterator over texts: a list, a generator, a one-dimensional array or Series of strings, and so on.

    The elements are checked by ``PromptTokenizer``.

    Raises:
        TypeError: ``texts`` is one string, is not iterable, has no order, or would iterate over something else.
    """
    kind = f"has type {type(texts).__name__}"
    if isinstance(texts, str):
        raise TypeError(sentence("texts", "is one string", "an iterable of str is expected", "Pass [text]."))
    if isinstance(texts, (bytes, bytearray)):
        raise TypeError(sentence("texts", kind, "an iterable of str is expected", "Pass [texts.decode()]."))
    if isinstance(texts, Mapping):
        hint = "Pass list(texts.values()), or list(texts) if you mean the keys."
        raise TypeError(sentence("texts", kind, "iterating it would embed its keys", hint))
    if isinstance(texts, (set, frozenset)):
        raise TypeError(sentence("texts", kind, "its vectors would have no order", "Pass list(texts)."))
    if (dimensions := getattr(texts, "ndim", 1)) != 1:  # numpy, and a DataFrame, which would iterate its column names
        hint = "Pass one column of it."
        raise TypeError(sentence("texts", f"{kind} and {dimensions} dimensions", "one dimension is expected", hint))
    try:
        return iter(texts)
    except TypeError as err:
        raise TypeError(sentence("texts", kind, "a str or an iterable of str is expected", "Pass [text].")) from err


def check_text(where: str, text: str) -> None:
    """Refuse anything but a string that UTF-8 can hold; ``where`` names it in the error.

    Raises:
        TypeError: it is not a string.
        OptionError: it holds a lone surrogate.
    """
    if not isinstance(text, str):
        raise TypeError(
            sentence(where, f"has type {type(text).__name__}", "a str is expected", "Convert it, or drop it.")
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise OptionError(where, f"cannot be encoded as UTF-8: {err}", None, "Repair the string.") from err


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], *, empty_token_id: int) -> list[list[int]]:
    """Tokenize prompts without special tokens.

    A prompt of no tokens (an empty text without instruction) becomes the single token ``empty_token_id``, so that
    it has a defined vector.

    Raises:
        BundleError: the tokenizer has no token for a part of a prompt.
    """
    try:
        with _errors_of_tokenizers():
            encodings = tokenizer.encode_batch_fast(list(prompts), add_special_tokens=False)
    except ValueError as err:
        raise BundleError(
            "tokenizer.json", f"cannot tokenize a text: {err}", None, "Export the bundle with a complete tokenizer."
        ) from err
    return [encoding.ids or [empty_token_id] for encoding in encodings]


def truncate(
    token_ids: list[list[int]],
    *,
    max_tokens: int,
    on_overflow: Overflow,
    side: TruncationSide = TruncationSide.RIGHT,
    first_row: int = 0,
) -> tuple[list[list[int]], list[int]]:
    """Cut prompts to ``max_tokens`` on one side.

    Returns:
        The prompts, and the positions of those that were cut.

    Raises:
        OptionError: a prompt is too long and ``on_overflow`` is ``error``; the first prompt is called ``first_row``.
    """
    too_long = [row for row, ids in enumerate(token_ids) if len(ids) > max_tokens]
    if too_long and on_overflow is Overflow.ERROR:
        row = too_long[0]
        more = f", and {len(too_long) - 1} more of these {len(token_ids)} texts are too long" if too_long[1:] else ""
        raise OptionError(
            f"texts[{first_row + row}]",
            f"has {len(token_ids[row])} tokens{more}",
            f"the bundle takes at most {max_tokens}, the instruction included",
            "Shorten the texts, or allow truncation with on_overflow='truncate'.",
        )
    kept = slice(max_tokens) if side is TruncationSide.RIGHT else slice(-max_tokens, None)
    return [ids[kept] for ids in token_ids], too_long


def common_length(token_ids: Sequence[list[int]]) -> int:
    """Return how many tokens all prompts begin with."""
    first, last = min(token_ids), max(token_ids)  # in the order of lists, all others lie between
    return next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
