"""Read tasks from files: scored pairs and labeled texts from TSV, retrieval from BEIR layout; all may be gzipped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gircse.evaluation.tasks.prompts import Prompt, read_json_lines, text_field
from gircse.evaluation.tasks.scoring import ClassificationTask, RetrievalTask, StsTask, Task
from gircse.runtime.errors import MeasurementError
from gircse.runtime.text_files import TextLine, read_lines

STS_INSTRUCTION = "Retrieve semantically similar text"
RETRIEVAL_INSTRUCTION = "Given a query, retrieve passages that answer it"
CLASSIFICATION_INSTRUCTION = "Identify the intent or category of the text"


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks to read, and the instruction put before their texts (retrieval: before the queries).

    Attributes:
        sts: TSV of scored pairs.
        retrieval: folder in BEIR layout.
        classification: TSV of labeled texts.
        sts_instruction: for ``sts``.
        retrieval_instruction: for the queries of ``retrieval``.
        classification_instruction: for ``classification``.
    """

    sts: Path | None = None
    retrieval: Path | None = None
    classification: Path | None = None
    sts_instruction: str = STS_INSTRUCTION
    retrieval_instruction: str = RETRIEVAL_INSTRUCTION
    classification_instruction: str = CLASSIFICATION_INSTRUCTION


def read_tasks(options: TaskOptions) -> list[Task]:
    """Read the tasks that the options name.

    Raises:
        TextFileError: a file cannot be read or is not UTF-8.
        MeasurementError: a file cannot be used.
    """
    tasks: list[Task] = []
    if options.sts:
        tasks.append(read_sts(options.sts, instruction=options.sts_instruction))
    if options.retrieval:
        tasks.append(read_retrieval(options.retrieval, instruction=options.retrieval_instruction))
    if options.classification:
        tasks.append(read_classification(options.classification, instruction=options.classification_instruction))
    return tasks


def read_sts(path: Path, *, instruction: str) -> StsTask:
    """Read scored pairs from a TSV with the columns ``score``, ``sentence1`` and ``sentence2``.

    Raises:
        TextFileError: the file cannot be read or is not UTF-8.
        MeasurementError: it cannot be used.
    """
    rows = list(_read_table(path, ("score", "sentence1", "sentence2"), flag="--sts"))
    if len(rows) < 3:
        raise MeasurementError(
            f"--sts {path}", f"has {len(rows)} pairs", "at least 3 are needed", "Choose a larger file."
        )
    prompts = list(dict.fromkeys(Prompt(text, instruction) for _, (_, *pair) in rows for text in pair))
    index = {prompt.text: at for at, prompt in enumerate(prompts)}
    gold = np.array([_number(score, where) for where, (score, _, _) in rows])
    if np.ptp(gold) == 0:
        raise MeasurementError(f"--sts {path}", f"has the score {gold[0]} everywhere", None, "Choose another file.")
    left, right = (np.array([index[pair[at]] for _, (_, *pair) in rows]) for at in (0, 1))
    return StsTask(_name(path), prompts, left, right, gold)


def read_retrieval(directory: Path, *, instruction: str) -> RetrievalTask:
    """Read a folder in BEIR layout: corpus.jsonl, queries.jsonl and qrels/test.tsv (or qrels.tsv).

    A document is its title and its text, joined by a space as BEIR does. Queries without judgment are left out.

    Raises:
        TextFileError: a file cannot be read or is not UTF-8.
        MeasurementError: a file is missing or cannot be used, or a judgment names an unknown document.
    """
    corpus = {
        text_field(row, "_id", where): f"{text_field(row, 'title', where, default='')} {text_field(row, 'text', where)}"
        for where, row in read_json_lines(_find(directory, "corpus.jsonl"))
    }
    queries = {
        text_field(row, "_id", where): text_field(row, "text", where)
        for where, row in read_json_lines(_find(directory, "queries.jsonl"))
    }
    qrels: dict[str, dict[str, int]] = {}
    path = _find(directory, "qrels/test.tsv", "qrels.tsv")
    for where, (query, document, relevance) in _read_table(
        path, ("query-id", "corpus-id", "score"), flag="--retrieval"
    ):
        if document not in corpus or query not in queries:
            raise MeasurementError(
                where,
                f"judges query {query!r} and document {document!r}",
                "queries.jsonl or corpus.jsonl lacks that id",
                "Take the judgments of the same collection.",
            )
        qrels.setdefault(query, {})[document] = int(_number(relevance, where))
    if not qrels:
        raise MeasurementError(str(path), "has no judgments", None, "Choose another collection.")
    prompts = [Prompt(queries[query], instruction) for query in qrels] + [
        Prompt(text.strip()) for text in corpus.values()
    ]
    return RetrievalTask(directory.resolve().name, prompts, list(qrels), list(corpus), qrels)


def read_classification(path: Path, *, instruction: str) -> ClassificationTask:
    """Read labeled texts from a TSV with the columns ``label`` and ``text``.

    Raises:
        TextFileError: the file cannot be read or is not UTF-8.
        MeasurementError: it cannot be used, or all labels are the same.
    """
    rows = [fields for _, fields in _read_table(path, ("label", "text"), flag="--classification")]
    names, labels = np.unique([label for label, _ in rows], return_inverse=True)
    if len(names) < 2:
        raise MeasurementError(
            f"--classification {path}", f"has {len(names)} labels", "at least 2 are needed", "Choose another file."
        )
    return ClassificationTask(_name(path), [Prompt(text, instruction) for _, text in rows], labels)


def _read_table(path: Path, columns: Sequence[str], *, flag: str) -> list[tuple[str, list[str]]]:
    """Return the place of each row, for errors, and its fields in the order of ``columns``."""
    lines = read_lines(path)
    header = next(lines, TextLine("", "")).text.split("\t")
    if missing := [column for column in columns if column not in header]:
        raise MeasurementError(
            f"{flag} {path}",
            f"has the columns {header}, without {missing[0]!r}",
            f"the first line must name {list(columns)}, separated by tabs",
            "Add the header, or rename the column.",
        )
    at = [header.index(column) for column in columns]
    rows = []
    for where, line in lines:
        fields = line.split("\t")
        if len(fields) != len(header):
            raise MeasurementError(
                where, f"has {len(fields)} fields", f"the header has {len(header)}", "Repair the line."
            )
        rows.append((where, [fields[index] for index in at]))
    return rows


def _find(directory: Path, *names: str) -> Path:
    candidates = [directory / (name + end) for name in names for end in ("", ".gz")]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise MeasurementError(
            f"--retrieval {directory}",
            f"has no {' or '.join(names)}",
            "a folder in BEIR layout has corpus.jsonl, queries.jsonl and qrels/test.tsv",
            "Check the path.",
        )
    return found


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise MeasurementError(where, f"has the score {text!r}", "a score is a finite number", "Repair the line.")
    return value


def _name(path: Path) -> str:
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]
