"""Texts to measure on: the built-in set, the user's own file, and prompts with different instructions."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gircse.runtime.errors import MeasurementError
from gircse.runtime.text_files import read_lines, read_texts
from gircse.runtime.tokenization import PromptTokenizer

BUILTIN = Path(__file__).parent / "texts.txt"
MIN_TEXTS = 20
"""Fewer texts make ten nearest neighbors, and the ranks of pairs, meaningless."""


class Prompt(NamedTuple):
    """A text with the instruction put before it, which may be empty."""

    text: str
    instruction: str = ""


def read_prompts(path: Path | None, *, instruction: str = "") -> list[Prompt]:
    """Read the texts of a parity run; repeated ones count once.

    Args:
        path: UTF-8, one text per line or, if it is named ``.jsonl``, one object ``{"text": ..., "instruction": ...}``
            per line, the instruction being optional; ``.gz`` is unpacked. None takes the built-in texts.
        instruction: for texts that have none.

    Raises:
        TextFileError: the file cannot be read, is not UTF-8, or holds no text.
        MeasurementError: a line is not a JSON object, or there are fewer than 20 different texts.
    """
    source = path or BUILTIN
    if Path(source.name.removesuffix(".gz")).suffix == ".jsonl":
        rows = [
            Prompt(text_field(row, "text", where), text_field(row, "instruction", where, default=instruction))
            for where, row in read_json_lines(source)
        ]
    else:
        rows = [Prompt(text, instruction) for text in read_texts(source)]
    prompts = list(dict.fromkeys(rows))
    if len(prompts) < MIN_TEXTS:
        raise MeasurementError(
            f"--texts {source}",
            f"has {len(prompts)} different texts",
            f"with fewer than {MIN_TEXTS}, ranks and neighbors mean nothing",
            "Add texts, or leave --texts out for the built-in ones.",
        )
    return prompts


def tokenize_prompts(tokenizer: PromptTokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the token ids of prompts whose instructions may differ."""
    token_ids: list[list[int]] = [[] for _ in prompts]
    for instruction in dict.fromkeys(prompt.instruction for prompt in prompts):
        rows = [row for row, prompt in enumerate(prompts) if prompt.instruction == instruction]
        found = tokenizer([prompts[row].text for row in rows], instruction=instruction)
        for row, ids in zip(rows, found, strict=True):
            token_ids[row] = ids
    return token_ids


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each JSON object, for errors, and the object; blank lines are skipped.

    Raises:
        TextFileError: the file cannot be read or is not UTF-8.
        MeasurementError: a line is not a JSON object.
    """
    for where, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise MeasurementError(
                where, f"is not JSON: {err}", "every line holds one JSON object", "Repair the line."
            ) from err
        if not isinstance(row, dict):
            raise MeasurementError(
                where, f"holds a JSON {type(row).__name__}", "every line holds one JSON object", "Repair the line."
            )
        yield where, row


def text_field(row: dict[str, Any], name: str, where: str, *, default: str | None = None) -> str:
    """Return a field that must be a string.

    Raises:
        MeasurementError: it is missing and has no default, or it is not a string.
    """
    value = row.get(name, default)
    if not isinstance(value, str):
        found = "has no" if value is None else f"has a {type(value).__name__} as"
        raise MeasurementError(where, f"{found} field {name!r}", "it must be a string", "Repair the line.")
    return value
