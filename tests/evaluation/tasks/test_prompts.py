"""Texts to measure on, from lines and from JSON lines."""

import json
from pathlib import Path

import pytest
from support.task_data import write

from gircse.evaluation.tasks.prompts import Prompt, read_prompts
from gircse.runtime import GircseError


def test_texts_of_every_kind(tmp_path: Path) -> None:
    lines = [f"text {i}" for i in range(25)]
    plain = write(tmp_path / "texts.txt", "\n".join([*lines, "", "text 3"]))
    assert read_prompts(plain, instruction="Find") == [Prompt(line, "Find") for line in lines]
    rows = [json.dumps({"text": line, **({"instruction": "Own"} if i else {})}) for i, line in enumerate(lines)]
    packed = write(tmp_path / "texts.jsonl.gz", "\n".join(rows))
    assert read_prompts(packed, instruction="Find") == [
        Prompt(line, "Own" if i else "Find") for i, line in enumerate(lines)
    ]
    assert len(read_prompts(None)) == 64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ntwo\n", r"has 2 different texts; with fewer than 20"),
        (b"same\n" * 50, r"has 1 different texts"),
        (b"fine\n\xff\xfe\n", r"UTF-8"),
        (None, r"No such file"),
    ],
)
def test_unusable_texts(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "texts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GircseError, match=message):
        read_prompts(path)
    if content is None:
        packed = tmp_path / "texts.txt.gz"
        packed.write_bytes(b"no gzip")
        with pytest.raises(GircseError, match="Not a gzipped file"):
            read_prompts(packed)
