"""The texts of a calibration: drawn from a file, split into observed and held-out ones, and tokenized."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gircse.calibration.calibration_file import TextsUsed
from gircse.runtime.batch_planner import TokenBatch, padded_batches
from gircse.runtime.errors import CalibrationError
from gircse.runtime.text_files import read_texts
from gircse.runtime.tokenization import PromptTokenizer

MIN_TEXTS = 32
"""Fewer different texts are not enough to estimate ranges, or to measure the sensitivity on."""

HELD_OUT_TEXTS, HELD_OUT_TOKENS = 64, 32
"""Texts, and tokens of each, that the sensitivity is measured on."""

BATCH_SIZE, BATCH_TOKENS = 16, 2048


@dataclass(frozen=True)
class CalibrationTexts:
    """Texts that were drawn from a file.

    Attributes:
        observed: the statistics are taken from these.
        held_out: the sensitivity is measured on these. They are observed ones where the file has too few others.
        seed: what they were drawn with.
    """

    observed: tuple[str, ...]
    held_out: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Corpus:
    """The texts as the model reads them.

    Attributes:
        observed: batches of token ids.
        held_out: batches of token ids, cut to ``HELD_OUT_TOKENS``.
        used: record of the observed texts.
    """

    observed: tuple[TokenBatch, ...]
    held_out: tuple[TokenBatch, ...]
    used: TextsUsed


def draw_texts(path: Path, *, samples: int, seed: int) -> CalibrationTexts:
    """Read a file and draw the texts to observe and, from the rest, the held-out ones.

    Args:
        path: file with one text per line.
        samples: maximum number of texts to observe.
        seed: of the draw.

    Raises:
        TextFileError: the file cannot be read, is not UTF-8, or holds no text.
        CalibrationError: it holds too few different texts.
    """
    different = list(dict.fromkeys(read_texts(path)))
    if len(different) < MIN_TEXTS:
        raise CalibrationError(
            f"--texts {path}",
            f"has {len(different)} different {'text' if len(different) == 1 else 'texts'}",
            f"a calibration needs at least {MIN_TEXTS}",
            "Add texts of the kind that will be embedded.",
        )
    order = np.random.default_rng(seed).permutation(len(different))
    observed = tuple(different[row] for row in order[:samples])
    held_out = tuple(different[row] for row in order[samples:][:HELD_OUT_TEXTS])
    if len(held_out) < MIN_TEXTS:
        held_out = observed[-HELD_OUT_TEXTS:]
    return CalibrationTexts(observed, held_out, seed)


def tokenize_texts(texts: CalibrationTexts, tokenizer: PromptTokenizer) -> Corpus:
    """Turn the texts into batches of token ids, as a bundle does."""
    observed = _batches(tokenizer, texts.observed)
    digest = hashlib.sha256("\n".join(texts.observed).encode()).hexdigest()
    tokens = sum(int(batch.attention_mask.sum()) for batch in observed)
    return Corpus(
        observed,
        _batches(dataclasses.replace(tokenizer, max_tokens=HELD_OUT_TOKENS), texts.held_out),
        TextsUsed(digest, len(texts.observed), tokens, texts.seed),
    )


def _batches(tokenizer: PromptTokenizer, texts: Sequence[str]) -> tuple[TokenBatch, ...]:
    ids, _ = tokenizer.tokenize(texts)
    pad = tokenizer.pad_token_id
    return tuple(padded_batches(ids, pad_token_id=pad, batch_size=BATCH_SIZE, batch_tokens=BATCH_TOKENS))
