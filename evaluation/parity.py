"""The parity run from end to end: a reference, one or more candidates, and what lies between them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gircse.calibration.progress import StageProgress
from gircse.evaluation.environment import describe_environment
from gircse.evaluation.gates import GateLimits, GateOverrides, GateResult, all_passed, at_least, at_most, limits_of
from gircse.evaluation.metrics import (
    SoftTokenHealth,
    cross_rank_correlation,
    neighbour_overlap,
    pairwise_rank_correlation,
)
from gircse.evaluation.parity_report import (
    SCHEMA_VERSION,
    BatchVariance,
    CandidateReport,
    CrossSteps,
    ParityReport,
    SoftTokens,
    StepParity,
    TaskParity,
    TextParity,
)
from gircse.evaluation.prompts import Prompt, read_prompts, tokenize_prompts
from gircse.evaluation.sides import (
    BundleSide,
    Side,
    TokenIds,
    TorchSide,
    check_same_task,
    checkpoint_token_ids,
    parse_bundle_reference,
    source_checkpoint,
)
from gircse.evaluation.step_trace import StepTrace, pooled
from gircse.evaluation.tasks import RetrievalTask, Task, TaskOptions, read_tasks, score_steps
from gircse.runtime.bundle import MANIFEST_NAME, Bundle, file_sha256
from gircse.runtime.errors import MeasurementError
from gircse.runtime.numerics import Float32, row_cosine
from gircse.runtime.token_batch import open_tokenizer

TORCH = "torch"

PAIRWISE_TEXTS = 2000
"""Most texts whose pairs are compared; of a longer list, a seeded sample of so many."""

ALONE_TEXTS = 32
"""Texts that are also run alone, from the shortest to the longest in even steps."""


@dataclass(frozen=True)
class ParityOptions:
    """What to compare; the fields are the flags of ``gircse-parity``.

    Attributes:
        bundle: bundle directory.
        precisions: variants to judge; empty means every one but the reference.
        reference: ``torch``, or ``BUNDLE[:PRECISION]``.
        model: where the checkpoint lies now, if not where the manifest says.
        adapter: where the adapter lies now.
        device: of the PyTorch reference.
        dtype: of the PyTorch reference: ``fp32``, ``fp16`` or ``bf16``.
        texts: file of texts, or None for the built-in ones.
        instruction: for texts that bring none.
        tasks: tasks that both sides are scored on.
        cross_steps: compute the matrix of query steps against document steps.
        limits: limits that replace the defaults.
        threads: threads of both sides; None leaves it to each.
    """

    bundle: Path
    precisions: Sequence[str] = ()
    reference: str = TORCH
    model: str | None = None
    adapter: str | None = None
    device: str = "cpu"
    dtype: str = "fp32"
    texts: Path | None = None
    instruction: str = ""
    tasks: TaskOptions = field(default_factory=TaskOptions)
    cross_steps: bool = False
    limits: GateOverrides = field(default_factory=GateOverrides)
    threads: int | None = None


@dataclass(frozen=True)
class ParityResult:
    """A report, and the vectors that its charts are drawn from.

    Attributes:
        report: the numbers.
        prompts: the texts.
        reference: (n, K + 1, hidden) float32, z_0..z_K.
        candidates: precision to the same of each candidate.
    """

    report: ParityReport
    prompts: Sequence[Prompt]
    reference: Float32
    candidates: dict[str, Float32]


@dataclass(frozen=True)
class _Inputs:
    """What both sides embed: texts that are looked at closely, and task prompts of which only the vectors count."""

    prompts: Sequence[Prompt]
    text_ids: TokenIds
    tasks: Sequence[Task]
    task_ids: TokenIds
    task_rows: Sequence[Sequence[int]]  # for each task, the row of each of its prompts in task_ids


@dataclass(frozen=True)
class _Reference:
    """What a candidate is compared with."""

    name: str
    vectors: Float32
    trace: StepTrace
    task_vectors: Float32
    token_mismatches: int | None  # None where both sides read the same tokenizer.json


def measure_parity(options: ParityOptions, *, progress: StageProgress | None = None) -> ParityResult:
    """Compare the precisions of a bundle with a reference.

    Raises:
        GircseError: a bundle, checkpoint, text file or task cannot be used, or a value is not finite.
        ValueError: an option is out of range.
    """
    progress = progress or StageProgress()
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"threads: {options.threads} | at least 1 | leave it out to use every physical core")
    bundle = Bundle.open(options.bundle)
    reference_bundle = _open_reference_bundle(options, bundle)
    precisions = _choose_precisions(options, bundle, reference_bundle)
    inputs = _read_inputs(options, bundle)
    reference = _run_reference(options, bundle, reference_bundle, inputs, progress)
    candidates, judged = {}, []
    for precision in precisions:
        candidates[precision], candidate = _run_candidate(options, bundle, precision, inputs, reference, progress)
        judged.append(candidate)
    report = ParityReport(
        schema_version=SCHEMA_VERSION,
        bundle=bundle.directory.name,
        manifest_sha256=file_sha256(bundle.directory / MANIFEST_NAME),
        reference=reference.name,
        steps=bundle.manifest.graph.steps,
        texts=len(inputs.prompts),
        texts_source=str(options.texts or "built-in"),
        reference_soft_tokens=tuple(
            _soft_tokens(reference.trace.health, step) for step in range(bundle.manifest.graph.steps)
        ),
        candidates=tuple(judged),
        environment=describe_environment(),
    )
    return ParityResult(report, inputs.prompts, reference.vectors, candidates)


def _open_reference_bundle(options: ParityOptions, bundle: Bundle) -> tuple[Bundle, str] | None:
    if options.reference == TORCH:
        return None
    path, precision = parse_bundle_reference(options.reference)
    reference = Bundle.open(path)
    check_same_task(bundle, reference)
    return reference, reference.variant(precision)[0]


def _choose_precisions(options: ParityOptions, bundle: Bundle, reference: tuple[Bundle, str] | None) -> Sequence[str]:
    for precision in options.precisions:
        bundle.variant(precision)
    if options.precisions:
        return list(dict.fromkeys(options.precisions))
    itself = reference is not None and reference[0].directory == bundle.directory
    found = [name for name in bundle.manifest.variants if not (itself and reference and name == reference[1])]
    if not found:
        raise MeasurementError(
            f"{bundle.directory}: {options.reference} is its only precision | a reference and something to compare "
            "with it | choose another --reference, or name it with --precision to compare it with itself"
        )
    return found


def _read_inputs(options: ParityOptions, bundle: Bundle) -> _Inputs:
    prompts = read_prompts(options.texts, instruction=options.instruction)
    tasks = read_tasks(options.tasks)
    row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(p for task in tasks for p in task.prompts))}
    tokenizer = open_tokenizer(bundle)
    return _Inputs(
        prompts=prompts,
        text_ids=tokenize_prompts(tokenizer, prompts),
        tasks=tasks,
        task_ids=tokenize_prompts(tokenizer, list(row_of)),
        task_rows=[[row_of[prompt] for prompt in task.prompts] for task in tasks],
    )


def _run_reference(
    options: ParityOptions,
    bundle: Bundle,
    reference_bundle: tuple[Bundle, str] | None,
    inputs: _Inputs,
    progress: StageProgress,
) -> _Reference:
    mismatches: int | None = None
    side: Side
    if reference_bundle is not None:
        side = BundleSide(*reference_bundle, threads=options.threads)
    else:
        with progress.stage(f"load the PyTorch model {bundle.manifest.model.name}"):
            checkpoint = source_checkpoint(bundle.manifest, model=options.model, adapter=options.adapter)
            side = TorchSide(bundle, checkpoint, device=options.device, dtype=options.dtype, threads=options.threads)
            theirs = checkpoint_token_ids(checkpoint, bundle, inputs.prompts)
            mismatches = sum(a != b for a, b in zip(inputs.text_ids, theirs, strict=True))
    total = len(inputs.text_ids) + len(inputs.task_ids)
    with progress.stage(f"embed {total} texts: {side.name}", total=total) as advance:
        vectors, trace = side.embed_and_trace(inputs.text_ids, advance)
        task_vectors = side.embed(inputs.task_ids, advance) if inputs.tasks else vectors[:0]
    return _Reference(side.name, vectors, trace, task_vectors, mismatches)


def _run_candidate(
    options: ParityOptions,
    bundle: Bundle,
    precision: str,
    inputs: _Inputs,
    reference: _Reference,
    progress: StageProgress,
) -> tuple[Float32, CandidateReport]:
    side = BundleSide(bundle, precision, threads=options.threads)
    alone_rows = _spread_by_length(inputs.text_ids)
    total = len(inputs.text_ids) + len(inputs.task_ids)
    title = f"embed {total} texts, {len(alone_rows)} of them also alone: {side.name}"
    with progress.stage(title, total=total + len(alone_rows)) as advance:
        embedder = side.open_embedder()
        vectors = side.embed_with(embedder, inputs.text_ids, advance)
        alone = side.embed_with(embedder, [inputs.text_ids[row] for row in alone_rows], advance, batch_size=1)
        task_vectors = side.embed_with(embedder, inputs.task_ids, advance) if inputs.tasks else vectors[:0]
        del embedder  # its weights, before the probe loads them again
    with progress.stage(f"look inside: {side.name}", total=2 * len(inputs.text_ids)) as advance:
        trace, forced = side.trace_and_force(inputs.text_ids, reference.trace.soft_tokens, advance)
    with progress.stage(f"compare {precision} with {reference.name}"):
        texts = _compare_texts(vectors, trace, reference, bundle)
        steps = _compare_steps(vectors, trace, forced, reference, texts)
        variance = BatchVariance(
            texts=len(alone),
            max_difference=float(np.abs(alone - vectors[alone_rows]).max()),
            cosine_min=float(row_cosine(alone, vectors[alone_rows]).min()),
        )
        tasks = _compare_tasks(task_vectors, reference, inputs)
        cross = _cross_steps(vectors, task_vectors, reference, inputs) if options.cross_steps else None
    gates = _judge(limits_of(precision, options.limits), steps, variance, tasks, reference.token_mismatches)
    return vectors, CandidateReport(
        precision=precision,
        passed=all_passed(gates),
        gates=tuple(gates),
        steps=tuple(steps),
        texts=tuple(texts),
        batch_variance=variance,
        tasks=tuple(tasks),
        cross_steps=cross,
    )


def _spread_by_length(token_ids: TokenIds) -> list[int]:
    by_length = sorted(range(len(token_ids)), key=lambda row: len(token_ids[row]))
    at = np.linspace(0, len(by_length) - 1, min(ALONE_TEXTS, len(by_length))).round().astype(int)
    return [by_length[index] for index in at]


def _compare_texts(vectors: Float32, trace: StepTrace, reference: _Reference, bundle: Bundle) -> list[TextParity]:
    pooling = bundle.manifest.graph.pooling
    cosines = row_cosine(vectors, reference.vectors)
    differences = np.abs(vectors - reference.vectors).max(-1)
    norms = [np.linalg.norm(pooled(states, pooling), axis=-1) for states in (trace.states, reference.trace.states)]
    ratios = norms[0] / norms[1]
    return [
        TextParity(*(tuple(map(float, row)) for row in rows)) for rows in zip(cosines, ratios, differences, strict=True)
    ]


def _compare_steps(
    vectors: Float32, trace: StepTrace, forced: Float32, reference: _Reference, texts: Sequence[TextParity]
) -> list[StepParity]:
    rows = _pairwise_sample(len(vectors))
    free_cosines = row_cosine(trace.states, reference.trace.states)
    forced_cosines = row_cosine(forced, reference.trace.states)
    steps = []
    for step in range(vectors.shape[1]):
        ours, theirs = vectors[rows, step], reference.vectors[rows, step]
        correlation = pairwise_rank_correlation(ours, theirs)
        if np.isnan(correlation):
            raise MeasurementError(
                f"step {step}: all texts have the same similarity to each other | texts that differ | choose other "
                "--texts; if these do differ, the model is broken"
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
                neighbour_overlap=neighbour_overlap(ours, theirs),
                state_cosine_min=float(free_cosines[:, step].min()),
                forced_state_cosine_min=float(forced_cosines[:, step].min()),
                soft_tokens=_soft_tokens(trace.health, step - 1) if step else None,
            )
        )
    return steps


def _pairwise_sample(texts: int) -> list[int]:
    if texts <= PAIRWISE_TEXTS:
        return list(range(texts))
    return sorted(np.random.default_rng(0).choice(texts, PAIRWISE_TEXTS, replace=False).tolist())


def _soft_tokens(health: SoftTokenHealth, index: int) -> SoftTokens:
    return SoftTokens(
        entropy=float(health.entropy[:, index].mean()),
        top1_mass=float(health.top1_mass[:, index].mean()),
        padded_mass=float(health.padded_mass[:, index].max()),
        norm=float(health.norm[:, index].mean()),
    )


def _compare_tasks(task_vectors: Float32, reference: _Reference, inputs: _Inputs) -> list[TaskParity]:
    results = []
    for task, rows in zip(inputs.tasks, inputs.task_rows, strict=True):
        ours, theirs = task_vectors[rows], reference.task_vectors[rows]
        interval = task.difference_interval(ours[:, -1], theirs[:, -1])
        results.append(
            TaskParity(
                task=task.name,
                metric=task.metric,
                reference=score_steps(task, theirs),
                candidate=score_steps(task, ours),
                difference_low=interval.low,
                difference_high=interval.high,
            )
        )
    return results


def _cross_steps(vectors: Float32, task_vectors: Float32, reference: _Reference, inputs: _Inputs) -> CrossSteps:
    steps = range(1, vectors.shape[1])
    for task, rows in zip(inputs.tasks, inputs.task_rows, strict=True):
        if isinstance(task, RetrievalTask):
            ours = task_vectors[rows]
            matrix = tuple(tuple(task.score_of_steps(ours[:, k], ours[:, j]) for j in steps) for k in steps)
            return CrossSteps(task.metric, task.name, matrix)
    chosen = _pairwise_sample(len(vectors))
    ours, wanted = vectors[chosen], reference.vectors[chosen, -1]
    matrix = tuple(tuple(cross_rank_correlation(ours[:, k], ours[:, j], wanted) for j in steps) for k in steps)
    return CrossSteps("rank correlation", None, matrix)


def _judge(
    limits: GateLimits,
    steps: Sequence[StepParity],
    variance: BatchVariance,
    tasks: Sequence[TaskParity],
    token_mismatches: int | None,
) -> list[GateResult]:
    refined = steps[1:] or steps  # a bundle of K = 0 is judged by its prompt vectors
    gates = [
        at_least("cosine", min(step.cosine_min for step in refined), limits.min_cosine),
        at_least("rank correlation", min(step.rank_correlation for step in refined), limits.min_rank_correlation),
        at_least("neighbour overlap", min(step.neighbour_overlap for step in refined), limits.min_overlap),
        at_most("batch difference", variance.max_difference, limits.max_batch_difference),
    ]
    gates += [
        at_most(f"drop of {task.metric}, {task.task}", task.reference[-1] - task.candidate[-1], limits.max_task_drop)
        for task in tasks
    ]
    if token_mismatches is not None:
        gates.append(at_most("texts with other token ids", token_mismatches, 0))
    return gates
