"""Tasks with a known answer: scored pairs (STS), retrieval in BEIR layout, labelled texts. Files may end in ``.gz``.

Each task says which prompts it needs and scores one vector for each of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, rankdata, spearmanr

from gircse.evaluation.metrics import Float64, similarities
from gircse.evaluation.prompts import Prompt, read_json_lines, read_lines, text_field
from gircse.runtime.errors import MeasurementError
from gircse.runtime.numerics import Float32

STS_INSTRUCTION = "Retrieve semantically similar text"
RETRIEVAL_INSTRUCTION = "Given a query, retrieve passages that answer it"
CLASSIFICATION_INSTRUCTION = "Identify the intent or category of the text"

RETRIEVED = 100
"""Documents kept for each query; nDCG@10 looks at the first ten."""

RESAMPLES = 1000
SEED = 0


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks to read, and the instruction put before their texts; of retrieval, before the queries.

    Attributes:
        sts: TSV of scored pairs.
        retrieval: folder in BEIR layout.
        classification: TSV of labelled texts.
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


class Interval(NamedTuple):
    """A 95 % bootstrap interval."""

    low: float
    high: float


class Task(Protocol):
    """Something to be good at."""

    @property
    def name(self) -> str:
        """Name of its file or folder."""

    @property
    def metric(self) -> str:
        """Name of the score."""

    @property
    def prompts(self) -> Sequence[Prompt]:
        """What it needs a vector of."""

    def score(self, vectors: Float32) -> float:
        """Score one vector for each prompt, (n, hidden) float32."""

    def difference_interval(self, ours: Float32, theirs: Float32) -> Interval:
        """Return where ``score(ours) - score(theirs)`` lies, over resamples of what the task asks."""


@dataclass(frozen=True)
class StsTask:
    """Scored pairs: Spearman correlation of cosine similarity and score.

    Attributes:
        name: of the file.
        prompts: every different text.
        left: (pairs,) index of the first text of each pair.
        right: (pairs,) index of the second.
        gold: (pairs,) the scores.
    """

    name: str
    prompts: Sequence[Prompt]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    gold: Float64
    metric: str = field(default="Spearman", init=False)

    def score(self, vectors: Float32) -> float:
        """Score one vector for each prompt, (n, hidden) float32."""
        return float(spearmanr(self._cosines(vectors), self.gold).statistic)

    def difference_interval(self, ours: Float32, theirs: Float32) -> Interval:
        """Return where ``score(ours) - score(theirs)`` lies, over resamples of the pairs."""

        def difference(gold: Float64, a: Float64, b: Float64, axis: int) -> Float64:
            ranks = [rankdata(series, axis=axis) for series in (gold, a, b)]
            centred = [rank - rank.mean(axis=axis, keepdims=True) for rank in ranks]
            unit = [rank / np.linalg.norm(rank, axis=axis, keepdims=True) for rank in centred]
            result: Float64 = (unit[0] * (unit[1] - unit[2])).sum(axis=axis)
            return result

        return _interval((self.gold, self._cosines(ours), self._cosines(theirs)), difference)

    def _cosines(self, vectors: Float32) -> Float64:
        cosines: Float64 = (vectors[self.left].astype(np.float64) * vectors[self.right]).sum(1)
        return cosines


@dataclass(frozen=True)
class RetrievalTask:
    """Queries and documents: nDCG@10.

    Attributes:
        name: of the folder.
        prompts: the queries with their instruction, then the documents without.
        query_ids: of the first prompts.
        document_ids: of the others.
        qrels: query id to document id to relevance.
    """

    name: str
    prompts: Sequence[Prompt]
    query_ids: Sequence[str]
    document_ids: Sequence[str]
    qrels: dict[str, dict[str, int]]
    metric: str = field(default="nDCG@10", init=False)

    def score(self, vectors: Float32) -> float:
        """Score one vector for each prompt, (n, hidden) float32."""
        return self.score_of_steps(vectors, vectors)

    def score_of_steps(self, for_queries: Float32, for_documents: Float32) -> float:
        """Score the queries of one set of vectors against the documents of another, (n, hidden) float32 each."""
        return float(self._ndcg(for_queries, for_documents).mean())

    def difference_interval(self, ours: Float32, theirs: Float32) -> Interval:
        """Return where ``score(ours) - score(theirs)`` lies, over resamples of the queries."""
        return _mean_interval(self._ndcg(ours, ours) - self._ndcg(theirs, theirs))

    def _ndcg(self, for_queries: Float32, for_documents: Float32) -> Float64:
        import pytrec_eval

        scores = similarities(for_queries[: len(self.query_ids)], for_documents[len(self.query_ids) :])
        kept = min(RETRIEVED, len(self.document_ids))
        best = np.argpartition(-scores, kept - 1, axis=1)[:, :kept]
        run = {
            query: {self.document_ids[at]: float(scores[row, at]) for at in best[row]}
            for row, query in enumerate(self.query_ids)
        }
        results = pytrec_eval.RelevanceEvaluator(self.qrels, {"ndcg_cut.10"}).evaluate(run)
        return np.array([results[query]["ndcg_cut_10"] for query in self.query_ids])


@dataclass(frozen=True)
class ClassificationTask:
    """Labelled texts: accuracy of the label of each text's nearest other text (1-NN, leave one out).

    Attributes:
        name: of the file.
        prompts: the texts.
        labels: (n,) label of each text as a number.
    """

    name: str
    prompts: Sequence[Prompt]
    labels: NDArray[np.int64]
    metric: str = field(default="1-NN accuracy", init=False)

    def score(self, vectors: Float32) -> float:
        """Score one vector for each prompt, (n, hidden) float32."""
        return float(self._correct(vectors).mean())

    def difference_interval(self, ours: Float32, theirs: Float32) -> Interval:
        """Return where ``score(ours) - score(theirs)`` lies, over resamples of the texts."""
        return _mean_interval(self._correct(ours) - self._correct(theirs))

    def _correct(self, vectors: Float32) -> Float64:
        scores = vectors @ vectors.T
        np.fill_diagonal(scores, -np.inf)
        correct: Float64 = (self.labels[scores.argmax(1)] == self.labels).astype(np.float64)
        return correct


def read_tasks(options: TaskOptions) -> list[Task]:
    """Read the tasks that the options name.

    Raises:
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


def score_steps(task: Task, vectors: Float32) -> tuple[float, ...]:
    """Score every step of (n, K + 1, hidden) float32 vectors.

    Raises:
        MeasurementError: the task gives no finite score.
    """
    scores = tuple(task.score(vectors[:, step]) for step in range(vectors.shape[1]))
    if not np.isfinite(scores).all():
        raise MeasurementError(
            f"task {task.name}: {task.metric} of {scores} | finite scores | the vectors of its texts do not differ"
        )
    return scores


def read_sts(path: Path, *, instruction: str) -> StsTask:
    """Read scored pairs from a TSV with the columns ``score``, ``sentence1`` and ``sentence2``.

    Raises:
        MeasurementError: the file cannot be read or used.
    """
    rows = list(_read_table(path, ("score", "sentence1", "sentence2"), flag="--sts"))
    if len(rows) < 3:
        raise MeasurementError(f"--sts {path}: {len(rows)} pairs | at least 3 | choose a larger file")
    prompts = list(dict.fromkeys(Prompt(text, instruction) for _, (_, *pair) in rows for text in pair))
    index = {prompt.text: at for at, prompt in enumerate(prompts)}
    gold = np.array([_number(score, where) for where, (score, _, _) in rows])
    if np.ptp(gold) == 0:
        raise MeasurementError(f"--sts {path}: every score is {gold[0]} | scores that differ | choose another file")
    left, right = (np.array([index[pair[at]] for _, (_, *pair) in rows]) for at in (0, 1))
    return StsTask(_name(path), prompts, left, right, gold)


def read_retrieval(directory: Path, *, instruction: str) -> RetrievalTask:
    """Read a folder in BEIR layout: corpus.jsonl, queries.jsonl and qrels/test.tsv (or qrels.tsv).

    A document is its title and its text, joined by a space as BEIR does. Queries without judgement are left out.

    Raises:
        MeasurementError: a file is missing or cannot be used, or a judgement names an unknown document.
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
                f"{where}: query {query!r}, document {document!r} | ids of queries.jsonl and corpus.jsonl | "
                "the judgements belong to another collection"
            )
        qrels.setdefault(query, {})[document] = int(_number(relevance, where))
    if not qrels:
        raise MeasurementError(f"{path}: no judgements | at least one | choose another collection")
    prompts = [Prompt(queries[query], instruction) for query in qrels] + [
        Prompt(text.strip()) for text in corpus.values()
    ]
    return RetrievalTask(directory.resolve().name, prompts, list(qrels), list(corpus), qrels)


def read_classification(path: Path, *, instruction: str) -> ClassificationTask:
    """Read labelled texts from a TSV with the columns ``label`` and ``text``.

    Raises:
        MeasurementError: the file cannot be read or used, or all labels are the same.
    """
    rows = [fields for _, fields in _read_table(path, ("label", "text"), flag="--classification")]
    names, labels = np.unique([label for label, _ in rows], return_inverse=True)
    if len(names) < 2:
        raise MeasurementError(f"--classification {path}: {len(names)} labels | at least 2 | choose another file")
    return ClassificationTask(_name(path), [Prompt(text, instruction) for _, text in rows], labels)


def _read_table(path: Path, columns: Sequence[str], *, flag: str) -> list[tuple[str, list[str]]]:
    """Return where each row stands, and its fields in the order of ``columns``."""
    lines = iter(read_lines(path))
    header = next(lines, ("", ""))[1].split("\t")
    if missing := [column for column in columns if column not in header]:
        raise MeasurementError(
            f"{flag} {path}: columns {header} | a header line with {list(columns)}, separated by tabs | {missing[0]!r} is "
            "missing: add the header or rename the column"
        )
    at = [header.index(column) for column in columns]
    rows = []
    for where, line in lines:
        fields = line.split("\t")
        if len(fields) != len(header):
            raise MeasurementError(f"{where}: {len(fields)} fields | {len(header)}, as in the header | repair the line")
        rows.append((where, [fields[index] for index in at]))
    return rows


def _find(directory: Path, *names: str) -> Path:
    candidates = [directory / (name + end) for name in names for end in ("", ".gz")]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise MeasurementError(
            f"--retrieval {directory}: no {' or '.join(names)} | a folder in BEIR layout: corpus.jsonl, queries.jsonl, "
            "qrels/test.tsv | check the path"
        )
    return found


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise MeasurementError(f"{where}: score {text!r} | a number | repair the line")
    return value


def _name(path: Path) -> str:
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def _mean_interval(values: Float64) -> Interval:
    return _interval((values,), lambda sample, axis: sample.mean(axis=axis))


def _interval(series: tuple[Float64, ...], statistic: Callable[..., Float64]) -> Interval:
    """Percentile bootstrap; the series are resampled together."""
    result = bootstrap(
        series, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=100, method="percentile", rng=SEED
    )
    return Interval(float(result.confidence_interval.low), float(result.confidence_interval.high))
