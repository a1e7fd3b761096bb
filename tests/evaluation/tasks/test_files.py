"""Files that hold no usable task are refused, and the message names the line."""

from pathlib import Path

import pytest
from support.task_data import STS, beir, write

from gircse.evaluation.tasks.files import TaskOptions, read_tasks
from gircse.runtime import GircseError


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        (
            {"sts": "x.tsv"},
            "a\tb\n1\t2\n",
            r"has the columns \['a', 'b'\], without 'score'; the first line must name \['score', 'sentence1'",
        ),
        ({"sts": "x.tsv"}, STS + "one field\n", r"line 14 has 1 fields; the header has 3"),
        (
            {"sts": "x.tsv"},
            STS.replace("\t3\t", "\tthree\t"),
            r"line 5 has the score 'three'; a score is a finite number",
        ),
        ({"sts": "x.tsv"}, STS.replace("\t3\t", "\tnan\t"), r"the score 'nan'"),
        ({"sts": "x.tsv"}, "score\tsentence1\tsentence2\n" + "1\ta\tb\n" * 5, r"has the score 1\.0 everywhere"),
        ({"sts": "x.tsv"}, "", r"--sts"),
        ({"classification": "x.tsv"}, "label\ttext\na\tb\na\tc\n", r"has 1 labels; at least 2"),
        ({"retrieval": "."}, "", r"has no corpus\.jsonl"),
    ],
)
def test_unusable_tasks(
    tmp_path: Path, options: dict[str, str], text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.tsv", text)
    with pytest.raises(GircseError, match=message):
        read_tasks(TaskOptions(**{name: Path(path) for name, path in options.items()}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", '{"_id": "d0", "text": 3}\n', r"line 1 has a int as field 'text'"),
        ("corpus.jsonl", "{\n", r"line 1 is not JSON: .*; every line holds one JSON object"),
        ("corpus.jsonl", "[1]\n", r"line 1 holds a JSON list"),
        (
            "corpus.jsonl",
            '{"_id": "d0", "text": "only one"}\n',
            r"line 3 judges query 'q0' and document 'd5'; queries\.jsonl or corpus\.jsonl",
        ),
    ],
)
def test_unusable_retrieval(tmp_path: Path, name: str, content: str, message: str) -> None:
    beir(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(GircseError, match=message):
        read_tasks(TaskOptions(retrieval=tmp_path))
