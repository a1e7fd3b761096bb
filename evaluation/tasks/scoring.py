"""Tasks with a known answer: scored pairs (STS), retrieval, labeled texts.

Each task says which prompts it needs and scores one vector for each of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, rankdata, spearmanr

from gircse.evaluation.tasks.prompts import Prompt
from gircse.reporting.similarity import similarities
from gircse.runtime.errors import MeasurementError
from gircse.runtime.numerics import Float32, Float64

RETRIEVED = 100
"""Documents kept for each query; nDCG@10 looks at the first ten."""

RESAMPLES = 1000
SEED = 0


class Interval(NamedTuple):
    """A 95 % bootstrap interval."""

    low: float
    high: float


class Task(Protocol):
    """Prompts with known answers, scored from one vector for each of them."""

    @property
    def name(self) -> str:
        """Name of its file or folder."""

    @property
    def metric(self) -> str:
        """Name of the score."""

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The texts that it needs vectors of."""

    def score(self, vectors: Float32) -> float:
        """Score one vector for each prompt, (n, hidden) float32."""

    def difference_interval(self, ours: Float32, theirs: Float32) -> Interval:
        """Return the interval of ``score(ours) - score(theirs)``, over resamples of what the task asks."""


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
        """Return the interval of ``score(ours) - score(theirs)``, over resamples of the pairs."""

        def difference(gold: Float64, a: Float64, b: Float64, axis: int) -> Float64:
            ranks = [rankdata(series, axis=axis) for series in (gold, a, b)]
            centered = [rank - rank.mean(axis=axis, keepdims=True) for rank in ranks]
            # A resample may draw only equal scores: that says nothing, so it counts as no difference.
            unit = [rank / np.maximum(np.linalg.norm(rank, axis=axis, keepdims=True), 1e-12) for rank in centered]
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
        """Return the interval of ``score(ours) - score(theirs)``, over resamples of the queries."""
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
    """Labeled texts: accuracy of the label of each text's nearest other text (1-NN, leave one out).

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
        """Return the interval of ``score(ours) - score(theirs)``, over resamples of the texts."""
        return _mean_interval(self._correct(ours) - self._correct(theirs))

    def _correct(self, vectors: Float32) -> Float64:
        scores = vectors @ vectors.T
        np.fill_diagonal(scores, -np.inf)
        correct: Float64 = (self.labels[scores.argmax(1)] == self.labels).astype(np.float64)
        return correct


def score_steps(task: Task, vectors: Float32) -> tuple[float, ...]:
    """Score every step of (n, K + 1, hidden) float32 vectors.

    Raises:
        MeasurementError: the task gives no finite score.
    """
    scores = tuple(task.score(vectors[:, step]) for step in range(vectors.shape[1]))
    if not np.isfinite(scores).all():
        raise MeasurementError(
            f"task {task.name}",
            f"has {task.metric} scores that are not finite: {scores}",
            None,
            "The vectors of its texts do not differ.",
        )
    return scores


def _mean_interval(values: Float64) -> Interval:
    return _interval((values,), lambda sample, axis: sample.mean(axis=axis))


def _interval(series: tuple[Float64, ...], statistic: Callable[..., Float64]) -> Interval:
    """Percentile bootstrap; the series are resampled together."""
    result = bootstrap(
        series, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=100, method="percentile", rng=SEED
    )
    return Interval(float(result.confidence_interval.low), float(result.confidence_interval.high))
