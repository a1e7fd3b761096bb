"""The parity run from end to end: a reference, one or more candidates, and how far they differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gircse.evaluation.environment import describe_environment
from gircse.evaluation.parity.backends import (
    Backend,
    BundleBackend,
    TokenIds,
    TorchBackend,
)
from gircse.evaluation.parity.compare import (
    ReferenceRun,
    compare_batches,
    compare_cross_steps,
    compare_steps,
    compare_tasks,
    compare_texts,
    evaluate_gates,
    summarize_soft_tokens,
)
from gircse.evaluation.parity.gates import all_passed, limits_of
from gircse.evaluation.parity.references import (
    check_same_task,
    checkpoint_token_ids,
    parse_bundle_reference,
    source_checkpoint,
)
from gircse.evaluation.parity.report_schema import SCHEMA_VERSION, CandidateReport, ParityReport
from gircse.evaluation.tasks.files import TaskOptions, read_tasks
from gircse.evaluation.tasks.prompts import Prompt, read_prompts, tokenize_prompts
from gircse.evaluation.tasks.scoring import Task
from gircse.reporting.progress import StageProgress
from gircse.runtime.bundle import Bundle, file_sha256
from gircse.runtime.errors import MeasurementError, OptionError
from gircse.runtime.manifest import MANIFEST_NAME, Layout
from gircse.runtime.numerics import Float32
from gircse.runtime.precision import CPU_ORDER, runs_on
from gircse.runtime.provider import Provider
from gircse.runtime.tokenization import open_tokenizer

TORCH = "torch"

ALONE_TEXTS = 32
"""Texts that are also run alone, evenly spread from the shortest to the longest."""


@dataclass(frozen=True)
class ParityOptions:
    """What to compare; the fields are the flags of ``gircse-parity``.

    Attributes:
        bundle: bundle directory.
        precisions: variants to compare; empty means every one that has the layout, except the reference.
        reference: ``torch``, or ``BUNDLE[:PRECISION]``.
        model: where the checkpoint is now, if not where the manifest says.
        adapter: where the adapter is now.
        device: of the PyTorch reference.
        dtype: of the PyTorch reference: ``fp32``, ``fp16`` or ``bf16``.
        texts: file of texts, or None for the built-in ones.
        instruction: for texts that bring none.
        tasks: tasks that both backends are scored on.
        cross_steps: compute the matrix of query steps against document steps.
        limits: limits that replace the defaults, by the name of the field of ``ParityLimits``.
        layout: graph to compare; None is the default of each variant.
        provider: where the compared variants run; a bundle as reference runs on the CPU.
        threads: threads per backend; None leaves it to each.
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
    limits: Mapping[str, float] = field(default_factory=dict)
    layout: Layout | None = None
    provider: Provider = Provider.CPU
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
    """What both backends embed: texts that are traced step by step, and task prompts, which need only vectors."""

    prompts: Sequence[Prompt]
    text_ids: TokenIds
    tasks: Sequence[Task]
    task_ids: TokenIds
    task_rows: Sequence[Sequence[int]]  # for each task, the row of each of its prompts in task_ids

    def by_task(self, vectors: Float32) -> list[Float32]:
        """Return the vectors of each task's prompts; a prompt that two tasks share was embedded once."""
        return [vectors[rows] for rows in self.task_rows]


def measure_parity(options: ParityOptions, *, progress: StageProgress | None = None) -> ParityResult:
    """Compare the precisions of a bundle with a reference.

    Raises:
        GircseError: a bundle, checkpoint, text file or task cannot be used, or a value is not finite.
        OptionError: an option is out of range.
    """
    progress = progress or StageProgress()
    if options.threads is not None and options.threads < 1:
        raise OptionError(
            "threads", f"is {options.threads}", "the minimum is 1", "Leave it out to use every physical core."
        )
    bundle = Bundle.open(options.bundle)
    reference_bundle = _open_reference_bundle(options, bundle)
    precisions = _choose_precisions(options, bundle, reference_bundle)
    inputs = _read_inputs(options, bundle)
    reference = _run_reference(options, bundle, reference_bundle, inputs, progress)
    candidates, reports = {}, []
    for precision in precisions:
        candidates[precision], candidate = _run_candidate(options, bundle, precision, inputs, reference, progress)
        reports.append(candidate)
    report = ParityReport(
        schema_version=SCHEMA_VERSION,
        bundle=bundle.directory.name,
        manifest_sha256=file_sha256(bundle.directory / MANIFEST_NAME),
        reference=reference.name,
        steps=bundle.manifest.graph.steps,
        texts=len(inputs.prompts),
        texts_source=str(options.texts or "built-in"),
        reference_soft_tokens=tuple(
            summarize_soft_tokens(reference.trace.stats, step) for step in range(1, bundle.manifest.graph.steps + 1)
        ),
        candidates=tuple(reports),
        environment=describe_environment(),
    )
    return ParityResult(report, inputs.prompts, reference.vectors, candidates)


def _open_reference_bundle(options: ParityOptions, bundle: Bundle) -> tuple[Bundle, str] | None:
    if options.reference == TORCH:
        return None
    path, precision = parse_bundle_reference(options.reference)
    reference = Bundle.open(path)
    check_same_task(bundle, reference)
    precision = precision or reference.default_precision(CPU_ORDER)
    reference.variant(precision)
    return reference, precision


def _choose_precisions(options: ParityOptions, bundle: Bundle, reference: tuple[Bundle, str] | None) -> Sequence[str]:
    variants = bundle.manifest.variants
    itself = reference is not None and reference[0].directory == bundle.directory
    others = [name for name in variants if not (itself and reference and name == reference[1])]
    if not options.precisions and not others:
        raise MeasurementError(
            str(bundle.directory),
            f"has no precision besides the reference {options.reference}",
            None,
            "Choose another --reference, or name it with --precision to compare it with itself.",
        )
    # What the CPU does not run is emulated there.
    runnable = [name for name in others if options.provider is Provider.CPU or runs_on(name, options.provider)]
    able = [name for name in runnable if options.layout in (None, *variants[name].graphs)]
    chosen = list(dict.fromkeys(options.precisions or able or others))
    for precision in chosen:
        bundle.graph(precision, bundle.layout(precision, options.layout))  # before the reference runs for minutes
    return chosen


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
) -> ReferenceRun:
    mismatches: int | None = None
    backend: Backend
    if reference_bundle is not None:
        backend = BundleBackend(*reference_bundle, threads=options.threads)
    else:
        with progress.stage(f"load the PyTorch model {bundle.manifest.model.name}"):
            checkpoint = source_checkpoint(bundle.manifest, model=options.model, adapter=options.adapter)
            backend = TorchBackend(
                bundle, checkpoint, device=options.device, dtype=options.dtype, threads=options.threads
            )
            theirs = checkpoint_token_ids(checkpoint, bundle, inputs.prompts)
            mismatches = sum(a != b for a, b in zip(inputs.text_ids, theirs, strict=True))
    total = len(inputs.text_ids) + len(inputs.task_ids)
    with progress.stage(f"embed {total} texts: {backend.name}", total=total) as advance:
        vectors, trace = backend.embed_and_trace(inputs.text_ids, advance)
        task_vectors = backend.embed(inputs.task_ids, advance) if inputs.tasks else vectors[:0]
    return ReferenceRun(backend.name, vectors, trace, inputs.by_task(task_vectors), mismatches)


def _run_candidate(
    options: ParityOptions,
    bundle: Bundle,
    precision: str,
    inputs: _Inputs,
    reference: ReferenceRun,
    progress: StageProgress,
) -> tuple[Float32, CandidateReport]:
    backend = BundleBackend(
        bundle, precision, layout=options.layout, provider=options.provider, threads=options.threads
    )
    alone_rows = _spread_by_length(inputs.text_ids)
    total = len(inputs.text_ids) + len(inputs.task_ids)
    title = f"embed {total} texts, {len(alone_rows)} of them also alone: {backend.name}"
    with progress.stage(title, total=total + len(alone_rows)) as advance:
        embedder = backend.open_embedder()
        vectors = backend.embed_with(embedder, inputs.text_ids, advance)
        alone = backend.embed_with(embedder, [inputs.text_ids[row] for row in alone_rows], advance, batch_size=1)
        task_vectors = backend.embed_with(embedder, inputs.task_ids, advance) if inputs.tasks else vectors[:0]
        del embedder  # its weights, before the probe loads them again
    with progress.stage(f"look inside: {backend.name}", total=2 * len(inputs.text_ids)) as advance:
        trace, forced = backend.trace_and_force(inputs.text_ids, reference.trace.soft_tokens, advance)
    with progress.stage(f"compare {precision} with {reference.name}"):
        by_task = inputs.by_task(task_vectors)
        texts = compare_texts(vectors, trace, reference, bundle.manifest.graph.pooling)
        steps = compare_steps(vectors, trace, forced, reference, texts)
        variance = compare_batches(alone, vectors[alone_rows])
        tasks = compare_tasks(inputs.tasks, by_task, reference.task_vectors)
        cross = compare_cross_steps(inputs.tasks, by_task, vectors, reference) if options.cross_steps else None
    gates = evaluate_gates(limits_of(precision, options.limits), steps, variance, tasks, reference.token_mismatches)
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
