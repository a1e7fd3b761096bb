"""From the embeddings of two backends to the numbers of a report, and to the verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gircse.evaluation.parity.gates import GateResult, at_least, at_most
from gircse.evaluation.parity.report_schema import (
    BatchVariance,
    CrossSteps,
    SoftTokens,
    StepParity,
    TaskParity,
    TextParity,
)
from gircse.evaluation.parity.soft_token_stats import SoftTokenStats
from gircse.evaluation.parity.step_trace import StepTrace
from gircse.evaluation.tasks.scoring import RetrievalTask, Task, score_steps
from gircse.reporting.similarity import (
    cross_rank_correlation,
    neighbor_overlap,
    pairwise_rank_correlation,
)
from gircse.runtime.errors import MeasurementError
from gircse.runtime.manifest import Pooling
from gircse.runtime.numerics import Float32, pool_states, row_cosine
from gircse.runtime.precision import ParityLimits

PAIRWISE_TEXTS = 2000
"""Maximum number of texts whose pairs are compared; a longer list is sampled with a fixed seed."""


@dataclass(frozen=True)
class ReferenceRun:
    """What a candidate is compared with.

    Attributes:
        name: of the backend.
        vectors: (n, K + 1, hidden) float32, z_0..z_K of the texts.
        trace: what was computed on the way.
        task_vectors: for each task, (m, K + 1, hidden) float32 of its prompts.
        token_mismatches: texts that the checkpoint's own tokenizer splits differently; None where both backends read
            the same tokenizer.json.
    """

    name: str
    vectors: Float32
    trace: StepTrace
    task_vectors: Sequence[Float32]
    token_mismatches: int | None


def compare_texts(vectors: Float32, trace: StepTrace, reference: ReferenceRun, pooling: Pooling) -> list[TextParity]:
    """Compare each text at each step; (n, K + 1, hidden) float32 vectors."""
    cosines = row_cosine(vectors, reference.vectors)
    differences = np.abs(vectors - reference.vectors).max(-1)
    norms = [np.linalg.norm(pool_states(states, pooling), axis=-1) for states in (trace.states, reference.trace.states)]
    ratios = norms[0] / norms[1]
    return [
        TextParity(*(tuple(map(float, row)) for row in rows)) for rows in zip(cosines, ratios, differences, strict=True)
    ]


def compare_steps(
    vectors: Float32, trace: StepTrace, forced: Float32, reference: ReferenceRun, texts: Sequence[TextParity]
) -> list[StepParity]:
    """Compare each step over all texts.

    Args:
        vectors: (n, K + 1, hidden) float32 of the candidate.
        trace: what it computed on the way.
        forced: (n, K + 1, hidden) float32, its states when fed the reference's soft tokens.
        reference: what it is compared with.
        texts: what ``compare_texts`` found.

    Raises:
        MeasurementError: the similarities between the texts are all the same.
    """
    rows = _pairwise_sample(len(vectors))
    free_cosines = row_cosine(trace.states, reference.trace.states)
    forced_cosines = row_cosine(forced, reference.trace.states)
    steps = []
    for step in range(vectors.shape[1]):
        ours, theirs = vectors[rows, step], reference.vectors[rows, step]
        correlation = pairwise_rank_correlation(ours, theirs)
        if np.isnan(correlation):
            raise MeasurementError(
                f"step {step}",
                "gives all texts the same similarity to each other",
                None,
                "Choose --texts that differ; if these do, the model is broken.",
            )
        cosines = [text.cosine[step] for text in texts]
        ratios = [text.norm_ratio[step] for text in texts]
        steps.append(
            StepParity(
                step=step,
                cosine_min=min(cosines),
                cosine_mean=float(np.mean(cosines)),
                norm_ratio_min=min(ratios),
                norm_ratio_max=max(ratios),
                max_difference=max(text.max_difference[step] for text in texts),
                rank_correlation=correlation,
                neighbor_overlap=neighbor_overlap(ours, theirs),
                state_cosine_min=float(free_cosines[:, step].min()),
                forced_state_cosine_min=float(forced_cosines[:, step].min()),
                soft_tokens=summarize_soft_tokens(trace.stats, step) if step else None,
            )
        )
    return steps


def compare_batches(one: Float32, other: Float32) -> BatchVariance:
    """Compare the same texts, run in two ways that should not matter; (n, K + 1, hidden) float32 each."""
    return BatchVariance(
        texts=len(one),
        max_difference=float(np.abs(one - other).max()),
        cosine_min=float(row_cosine(one, other).min()),
    )


def compare_tasks(tasks: Sequence[Task], ours: Sequence[Float32], theirs: Sequence[Float32]) -> list[TaskParity]:
    """Score both backends on each task; for each, (m, K + 1, hidden) float32 vectors of its prompts.

    Raises:
        MeasurementError: a task gives no finite score.
    """
    results = []
    for task, candidate, reference in zip(tasks, ours, theirs, strict=True):
        interval = task.difference_interval(candidate[:, -1], reference[:, -1])
        results.append(
            TaskParity(
                task=task.name,
                metric=task.metric,
                reference=score_steps(task, reference),
                candidate=score_steps(task, candidate),
                difference_low=interval.low,
                difference_high=interval.high,
            )
        )
    return results


def compare_cross_steps(
    tasks: Sequence[Task], task_vectors: Sequence[Float32], vectors: Float32, reference: ReferenceRun
) -> CrossSteps:
    """Match queries refined by k steps with documents refined by j: on the first retrieval task, or on the texts.

    Args:
        tasks: the tasks.
        task_vectors: for each task, the candidate's (m, K + 1, hidden) float32 vectors.
        vectors: (n, K + 1, hidden) float32, the candidate's vectors of the texts.
        reference: whose similarities at K steps the texts are measured by.
    """
    steps = range(1, vectors.shape[1])
    for task, ours in zip(tasks, task_vectors, strict=True):
        if isinstance(task, RetrievalTask):
            matrix = tuple(tuple(task.score_of_steps(ours[:, k], ours[:, j]) for j in steps) for k in steps)
            return CrossSteps(task.metric, task.name, matrix)
    rows = _pairwise_sample(len(vectors))
    ours, wanted = vectors[rows], reference.vectors[rows, -1]
    matrix = tuple(tuple(cross_rank_correlation(ours[:, k], ours[:, j], wanted) for j in steps) for k in steps)
    return CrossSteps("rank correlation", None, matrix)


def summarize_soft_tokens(stats: SoftTokenStats, step: int) -> SoftTokens:
    """Summarize the soft tokens of step k = 1..K over all texts."""
    at = step - 1
    return SoftTokens(
        entropy=float(stats.entropy[:, at].mean()),
        top1_mass=float(stats.top1_mass[:, at].mean()),
        padded_mass=float(stats.padded_mass[:, at].max()),
        norm=float(stats.norm[:, at].mean()),
    )


def evaluate_gates(
    limits: ParityLimits,
    steps: Sequence[StepParity],
    variance: BatchVariance,
    tasks: Sequence[TaskParity],
    token_mismatches: int | None,
    prefix_variance: BatchVariance | None = None,
) -> list[GateResult]:
    """Compare the numbers with the limits."""
    refined = steps[1:] or steps  # a bundle with K = 0 has only its prompt vectors
    gates = [
        at_least("cosine", min(step.cosine_min for step in refined), limits.min_cosine),
        at_least("rank correlation", min(step.rank_correlation for step in refined), limits.min_rank_correlation),
        at_least("neighbor overlap", min(step.neighbor_overlap for step in refined), limits.min_overlap),
        at_most("batch difference", variance.max_difference, limits.max_batch_difference),
    ]
    if prefix_variance is not None:
        gates.append(at_most("prefix difference", prefix_variance.max_difference, limits.max_batch_difference))
    gates += [
        at_most(f"drop of {task.metric}, {task.task}", task.reference[-1] - task.candidate[-1], limits.max_task_drop)
        for task in tasks
    ]
    if token_mismatches is not None:
        gates.append(at_most("texts with other token ids", token_mismatches, 0))
    return gates


def _pairwise_sample(texts: int) -> list[int]:
    if texts <= PAIRWISE_TEXTS:
        return list(range(texts))
    return sorted(np.random.default_rng(0).choice(texts, PAIRWISE_TEXTS, replace=False).tolist())
