"""The parity run from end to end: a reference, one or more candidates, and how far they differ.

Each side runs in a process of its own, one after the other: the reference first, because its soft tokens are fed to the
candidates.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gircse.evaluation.environment import describe_environment
from gircse.evaluation.parity.backends import BundleBackend, candidate_backend
from gircse.evaluation.parity.batches import spread_by_length
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
from gircse.evaluation.parity.locate import locate_departures
from gircse.evaluation.parity.options import TORCH, ParityOptions
from gircse.evaluation.parity.references import (
    check_same_task,
    parse_bundle_reference,
    source_checkpoint,
)
from gircse.evaluation.parity.report_schema import SCHEMA_VERSION, CandidateReport, ParityReport
from gircse.evaluation.parity.side_process import run_side
from gircse.evaluation.parity.sides import (
    CandidateSide,
    ReferenceSide,
    SideInputs,
    compute_bundle_reference,
    compute_candidate,
    compute_torch_reference,
)
from gircse.evaluation.tasks.files import read_tasks
from gircse.evaluation.tasks.prompts import Prompt, read_prompts, tokenize_prompts
from gircse.evaluation.tasks.scoring import Task
from gircse.reporting.progress import StageProgress
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import MeasurementError, OptionError
from gircse.runtime.numerics import Float32
from gircse.runtime.precision import CPU_ORDER, runs_on
from gircse.runtime.provider import Provider
from gircse.runtime.tokenization import open_tokenizer

PREFIX_TEXTS = 20
"""Texts, evenly spread over all lengths, that are also run after an instruction with and without the prefix cache."""

PREFIX_INSTRUCTION = "Given a customer question, retrieve similar questions that have the same answer"
"""That instruction, where the user names none: some 18 tokens, with which the texts are worth it on a GPU too."""


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
class _Data:
    """The texts and tasks, and what both sides embed of them."""

    prompts: Sequence[Prompt]
    tasks: Sequence[Task]
    inputs: SideInputs
    task_rows: Sequence[Sequence[int]]  # for each task, the row of each of its prompts in inputs.task_ids

    def by_task(self, vectors: Float32) -> list[Float32]:
        """Return the vectors of each task's prompts; a prompt that two tasks share was embedded once."""
        return [vectors[rows] for rows in self.task_rows]


def measure_parity(options: ParityOptions, *, progress: StageProgress | None = None) -> ParityResult:
    """Compare the precisions of a bundle with a reference; in a script, under ``if __name__ == "__main__"``.

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
    data = _read_data(options, bundle)
    candidates, reports = {}, []
    with tempfile.TemporaryDirectory(prefix="gircse-parity-") as scratch:
        folder = Path(scratch) / "reference"
        side = _run_reference(options, bundle, reference_bundle, data, folder, progress)
        tasks = data.by_task(side.task_vectors)
        reference = ReferenceRun(side.name, side.vectors, side.trace, tasks, side.token_mismatches)
        for precision in precisions:
            backend = candidate_backend(options, bundle, precision)
            place = Path(scratch) / precision
            candidate = run_side(backend.name, place, progress, compute_candidate, backend, data.inputs, folder)
            with progress.stage(f"compare {precision} with {reference.name}"):
                reports.append(_compare(options, bundle, precision, data, candidate, reference))
            candidates[precision] = candidate.vectors
        if options.locate:
            texts = data.inputs.text_ids
            reports = locate_departures(options, bundle, reference_bundle, reports, texts, Path(scratch), progress)
    report = ParityReport(
        schema_version=SCHEMA_VERSION,
        bundle=bundle.directory.name,
        manifest_sha256=bundle.manifest_sha256(),
        reference=reference.name,
        steps=bundle.manifest.graph.steps,
        texts=len(data.prompts),
        texts_source=str(options.texts or "built-in"),
        reference_soft_tokens=tuple(
            summarize_soft_tokens(reference.trace.stats, step) for step in range(1, bundle.manifest.graph.steps + 1)
        ),
        candidates=tuple(reports),
        environment=describe_environment(),
    )
    return ParityResult(report, data.prompts, reference.vectors, candidates)


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
    for precision in chosen:  # refuse a graph that is not there before the reference runs for minutes
        bundle.graph(precision, bundle.layout(precision, options.provider, options.layout))
    return chosen


def _read_data(options: ParityOptions, bundle: Bundle) -> _Data:
    prompts = read_prompts(options.texts, instruction=options.instruction)
    tasks = read_tasks(options.tasks)
    row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(p for task in tasks for p in task.prompts))}
    tokenizer = open_tokenizer(bundle)
    text_ids = tokenize_prompts(tokenizer, prompts)
    after = [prompts[row].text for row in spread_by_length(text_ids, PREFIX_TEXTS)]
    prefix_ids = tokenizer(after, instruction=options.instruction or PREFIX_INSTRUCTION)
    return _Data(
        prompts=prompts,
        tasks=tasks,
        inputs=SideInputs(text_ids, tokenize_prompts(tokenizer, list(row_of)), prefix_ids),
        task_rows=[[row_of[prompt] for prompt in task.prompts] for task in tasks],
    )


def _run_reference(
    options: ParityOptions,
    bundle: Bundle,
    reference_bundle: tuple[Bundle, str] | None,
    data: _Data,
    folder: Path,
    progress: StageProgress,
) -> ReferenceSide:
    """Compute the reference, and keep what it gives in a folder."""
    if reference_bundle is not None:
        backend = BundleBackend(*reference_bundle, threads=options.threads)
        return run_side(backend.name, folder, progress, compute_bundle_reference, backend, data.inputs)
    checkpoint = source_checkpoint(bundle.manifest, model=options.model, adapter=options.adapter)
    return run_side(
        "the PyTorch model",
        folder,
        progress,
        compute_torch_reference,
        bundle,
        checkpoint,
        data.inputs,
        prompts=data.prompts,
        options=options.reference_options,
        threads=options.threads,
    )


def _compare(
    options: ParityOptions,
    bundle: Bundle,
    precision: str,
    data: _Data,
    candidate: CandidateSide,
    reference: ReferenceRun,
) -> CandidateReport:
    vectors, trace = candidate.vectors, candidate.trace
    by_task = data.by_task(candidate.task_vectors)
    texts = compare_texts(vectors, trace, reference, bundle.manifest.graph.pooling)
    steps = compare_steps(vectors, trace, candidate.forced, reference, texts)
    variance = compare_batches(candidate.alone, vectors[candidate.alone_rows])
    prefix_variance = compare_batches(candidate.shared, candidate.whole) if len(candidate.shared) else None
    tasks = compare_tasks(data.tasks, by_task, reference.task_vectors)
    cross = compare_cross_steps(data.tasks, by_task, vectors, reference) if options.cross_steps else None
    limits = limits_of(precision, options.limits)
    gates = evaluate_gates(limits, steps, variance, tasks, reference.token_mismatches, prefix_variance)
    return CandidateReport(
        precision=precision,
        passed=all_passed(gates),
        gates=tuple(gates),
        steps=tuple(steps),
        texts=tuple(texts),
        batch_variance=variance,
        tasks=tuple(tasks),
        cross_steps=cross,
        prefix_variance=prefix_variance,
    )
