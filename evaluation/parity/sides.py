"""What the two sides of a comparison compute; each function is called in a process of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gircse.checkpoint.reference_choice import ReferenceOptions
from gircse.checkpoint.source import Checkpoint
from gircse.evaluation.parity.backends import Backend, BundleBackend, TokenIds, TorchBackend
from gircse.evaluation.parity.batches import spread_by_length
from gircse.evaluation.parity.references import checkpoint_token_ids
from gircse.evaluation.parity.side_process import load_result
from gircse.evaluation.parity.step_trace import StepTrace
from gircse.evaluation.tasks.prompts import Prompt
from gircse.reporting.progress import StageProgress
from gircse.reporting.sizes import duration
from gircse.runtime import Embedder
from gircse.runtime.bundle import Bundle
from gircse.runtime.numerics import Float32
from gircse.runtime.tokenization import common_length

ALONE_TEXTS = 32
"""Texts that are also run alone, evenly spread from the shortest to the longest."""


@dataclass(frozen=True)
class SideInputs:
    """What is embedded.

    Attributes:
        text_ids: texts, traced step by step on both sides.
        task_ids: task prompts, of which both sides give only vectors.
        prefix_ids: texts that begin with one instruction; a candidate that can embeds them with and without its cache.
    """

    text_ids: TokenIds
    task_ids: TokenIds
    prefix_ids: TokenIds

    @property
    def total(self) -> int:
        """Number of texts and prompts that both sides embed."""
        return len(self.text_ids) + len(self.task_ids)


@dataclass(frozen=True)
class ReferenceSide:
    """What a reference gives.

    Attributes:
        name: of the backend.
        vectors: (n, K + 1, hidden) float32, z_0..z_K of the texts.
        task_vectors: (m, K + 1, hidden) float32 of the task prompts.
        trace: what was computed on the way.
        token_mismatches: texts that the checkpoint's own tokenizer splits differently; None where both backends read
            the same tokenizer.json.
    """

    name: str
    vectors: Float32
    task_vectors: Float32
    trace: StepTrace
    token_mismatches: int | None


@dataclass(frozen=True)
class CandidateSide:
    """What a candidate gives.

    Attributes:
        vectors: (n, K + 1, hidden) float32, z_0..z_K of the texts.
        task_vectors: (m, K + 1, hidden) float32 of the task prompts.
        trace: what was computed on the way.
        forced: (n, K + 1, hidden) float32, states when every step is fed the reference's soft tokens.
        alone: (a, K + 1, hidden) float32, vectors of texts that were run alone.
        alone_rows: which those are.
        whole: (p, K + 1, hidden) float32, vectors of the prompts with an instruction, run whole.
        shared: the same with the instruction run once; none, like ``whole``, where the runtime does not do that.
    """

    vectors: Float32
    task_vectors: Float32
    trace: StepTrace
    forced: Float32
    alone: Float32
    alone_rows: Sequence[int]
    whole: Float32
    shared: Float32


def compute_torch_reference(
    progress: StageProgress,
    bundle: Bundle,
    checkpoint: Checkpoint,
    inputs: SideInputs,
    *,
    prompts: Sequence[Prompt],
    options: ReferenceOptions,
    threads: int | None,
) -> ReferenceSide:
    """Run PyTorch on the checkpoint of a bundle; ``prompts`` are the texts of ``inputs.text_ids``."""
    with progress.stage(f"load the PyTorch model {bundle.manifest.model.name}"):
        theirs = checkpoint_token_ids(checkpoint, bundle, prompts)
        backend = TorchBackend(bundle, checkpoint, options, threads=threads)
    mismatches = sum(a != b for a, b in zip(inputs.text_ids, theirs, strict=True))
    for note in backend.notes:
        progress.note(f"  {note}")
    if (seconds := backend.estimate_seconds(inputs.text_ids, inputs.task_ids)) is not None:
        progress.note(f"  it will take about {duration(seconds)}")
    return _run_reference(progress, backend, inputs, token_mismatches=mismatches)


def compute_bundle_reference(progress: StageProgress, backend: BundleBackend, inputs: SideInputs) -> ReferenceSide:
    """Run a precision of a bundle as the reference."""
    _note_memory(progress, backend)
    return _run_reference(progress, backend, inputs, token_mismatches=None)


def compute_candidate(
    progress: StageProgress, backend: BundleBackend, inputs: SideInputs, reference: Path
) -> CandidateSide:
    """Run a precision of a bundle; ``reference`` is the folder with the result of the reference."""
    alone_rows = spread_by_length(inputs.text_ids, ALONE_TEXTS)
    _note_memory(progress, backend)
    title = f"embed {inputs.total} texts, {len(alone_rows)} of them also alone: {backend.name}"
    with progress.stage(title, total=inputs.total + len(alone_rows)) as advance:
        embedder = backend.open_embedder()
        vectors = backend.embed_with(embedder, inputs.text_ids, advance)
        alone = backend.embed_with(embedder, [inputs.text_ids[row] for row in alone_rows], advance, batch_size=1)
        task_vectors = backend.embed_with(embedder, inputs.task_ids, advance) if inputs.task_ids else vectors[:0]
    whole, shared = run_with_and_without_cache(progress, backend, embedder, inputs.prefix_ids) or (
        vectors[:0],
        vectors[:0],
    )
    del embedder  # its weights, before the probe loads them again
    soft_tokens = load_result(reference).trace.soft_tokens
    with progress.stage(f"look inside: {backend.name}", total=2 * len(inputs.text_ids)) as advance:
        trace, forced = backend.trace_and_force(inputs.text_ids, soft_tokens, advance)
    return CandidateSide(vectors, task_vectors, trace, forced, alone, alone_rows, whole, shared)


def run_with_and_without_cache(
    progress: StageProgress, backend: BundleBackend, embedder: Embedder, token_ids: TokenIds
) -> tuple[Float32, Float32] | None:
    """Return the vectors of prompts that were run whole, and after what they begin with; None if that is never done."""
    if not embedder.prefix_cache_info().max_size:
        return None
    title = f"embed {len(token_ids)} texts with an instruction, run once and in each: {backend.name}"
    with progress.stage(title, total=2 * len(token_ids)) as advance:
        tokens = common_length(token_ids)
        shared = backend.embed_with(embedder, token_ids, advance, instruction_tokens=tokens)
        if not embedder.prefix_cache_info().misses:  # too few tokens to be worth it
            return None
        return backend.embed_with(embedder, token_ids, advance), shared


def _note_memory(progress: StageProgress, backend: BundleBackend) -> None:
    if backend.memory_note is not None:
        progress.note(f"  {backend.memory_note}")


def _run_reference(
    progress: StageProgress, backend: Backend, inputs: SideInputs, *, token_mismatches: int | None
) -> ReferenceSide:
    with progress.stage(f"embed {inputs.total} texts: {backend.name}", total=inputs.total) as advance:
        vectors, trace = backend.embed_and_trace(inputs.text_ids, advance, more=inputs.task_ids)
    texts = len(inputs.text_ids)
    return ReferenceSide(backend.name, vectors[:texts], vectors[texts:], trace, token_mismatches)
