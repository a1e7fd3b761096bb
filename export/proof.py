"""The proof of an export, before it is published: the runtime, on the staged bundle, gives PyTorch's vectors."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from gircse.checkpoint.available_memory import available_memory
from gircse.checkpoint.reference import Reference, WholeReference, step_states, tensors_of
from gircse.export.graph.builder import RefinementSettings
from gircse.export.graph.separate_weights import separate_weights
from gircse.reporting.progress import StageProgress
from gircse.reporting.sizes import gib
from gircse.runtime import Embedder
from gircse.runtime.batch_planner import pad_batch
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import ExportError, GircseError
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import Float32, l2_normalize, pool_states, row_cosine
from gircse.runtime.ort_session import open_session
from gircse.runtime.precision import SPECS, Precision, session_bytes
from gircse.runtime.self_test import (
    GoldenVectors,
    SelfTestReport,
    all_vectors,
    compare_with_golden,
    read_golden_vectors,
)

MAX_SECONDS = 600.0
"""What the golden texts of one graph may take; those that would take longer are left out."""

EXCUSE = 0.01
"""A model amplifies rounding if PyTorch itself, in another precision, misses a hundredth of what the export missed. A
faulty export of a sound model: 1e-7 and less."""

OpenReference = Callable[[], Reference]
"""Opens the PyTorch reference, in FP32."""


def check_runtime() -> None:
    """Refuse to export where ONNX Runtime is missing: nothing is published that it has not run.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import onnxruntime as _  # noqa: F401
    except ImportError as err:
        raise ExportError(
            "onnxruntime",
            "is not installed",
            "a bundle is run before it is published",
            "Install it: pip install 'gircse-deploy[cpu]'",
        ) from err


def prove_bundle(
    directory: Path, settings: RefinementSettings, *, open_reference: OpenReference, progress: StageProgress
) -> Mapping[str, Mapping[Layout, int]]:
    """Run every graph that the CPU runs, and compare every step of the golden texts with PyTorch's vectors.

    Args:
        directory: the staged bundle, complete.
        settings: K, pooling, temperature.
        open_reference: is asked for the reference again only if a graph fails, to find out why.
        progress: where to show the stages.

    Returns:
        How many texts each graph of each variant embedded. A graph that is not there was not run, for want of memory
        or of kernels.

    Raises:
        ExportError: a graph cannot be run, or a vector is too far from PyTorch's.
    """
    bundle = Bundle.open(directory)
    golden = read_golden_vectors(bundle)
    embeddings = bundle.manifest.graph.vocab_size * bundle.manifest.graph.hidden_size
    checked: dict[str, dict[Layout, int]] = defaultdict(dict)
    for name, variant in bundle.manifest.variants.items():
        precision = Precision(name)
        for layout in variant.graphs if SPECS[precision].cpu else ():
            copy_weights, needed = session_memory(
                precision,
                weights=bundle.manifest.weight_bytes(name),
                embeddings=embeddings,
                free=(free := available_memory()),
            )
            if needed > free:
                memory = f"that needs {gib(needed)} of memory, {gib(free)} is available"
                progress.note(f"  {precision} ({layout}) is not checked against PyTorch: {memory}")
                continue
            slowly = "" if copy_weights else ", slowly, because copies of the weights do not fit in memory"
            with progress.stage(f"check {precision} ({layout}) against PyTorch{slowly}"):
                report = _run(bundle, golden, precision, layout, copy_weights=copy_weights)
                if not report.passed:
                    raise _failure(bundle, precision, layout, report, settings, open_reference)
            checked[name][layout] = report.texts
            if report.texts < len(golden.texts):
                progress.note(f"  {report.texts} of {len(golden.texts)} texts: the others would have taken too long")
    return checked


def session_memory(precision: str, *, weights: int, embeddings: int, free: int) -> tuple[bool, int]:
    """Choose how a variant runs on the CPU.

    Args:
        precision: of the variant.
        weights: bytes of its weights.
        embeddings: elements of the embedding table.
        free: bytes of memory.

    Returns:
        Whether copies of the weights fit (see ``load_graph``), and what the session takes.
    """
    with_copies = session_bytes(precision, weights=weights, embeddings=embeddings)
    if with_copies <= free:
        return True, with_copies
    return False, session_bytes(precision, weights=weights, embeddings=embeddings, copy_weights=False)


def _run(
    bundle: Bundle, golden: GoldenVectors, precision: Precision, layout: Layout, *, copy_weights: bool
) -> SelfTestReport:
    # Not verified: the hashes were taken while the files were written.
    try:
        content = None if copy_weights else separate_weights(bundle.graph(precision, layout))
        session = open_session(bundle, precision, layout=layout, content=content, copy_weights=copy_weights)
        with Embedder.from_session(bundle, session, precision=precision) as embedder:
            return _compare(embedder, golden)
    except GircseError as err:
        raise ExportError(
            f"the {precision} graph ({layout})",
            f"cannot be run by ONNX Runtime: {err}",
            "nothing was published",
            "This is a fault of the export: please report it with the model's config.json.",
        ) from err


def _compare(embedder: Embedder, golden: GoldenVectors) -> SelfTestReport:
    """Embed the shortest golden text, then as many of the others at once as the time allows, until none is left."""
    left = sorted(range(len(golden.texts)), key=lambda text: len(golden.token_ids[text]))
    vectors: dict[int, Float32] = {}
    end, texts_at_once = time.perf_counter() + MAX_SECONDS, 1
    while texts := left[: max(0, texts_at_once)]:
        start = time.perf_counter()
        vectors |= _embed(embedder, golden, texts)
        left = left[len(texts) :]
        now = time.perf_counter()
        # Many texts take less than as many times one of them, so the next batch ends in time.
        texts_at_once = int((end - now) / (now - start) * len(texts))
    done = sorted(vectors)
    ours = np.stack([vectors[text] for text in done])
    report = compare_with_golden(ours, golden.vectors[done], precision=embedder.precision)
    return dataclasses.replace(report, worst_text=done[report.worst_text])


def _embed(embedder: Embedder, golden: GoldenVectors, texts: Sequence[int]) -> dict[int, Float32]:
    """Return h_0 normalized and z_1..z_K (K + 1, hidden) float32 of some golden texts, embedded as one batch."""
    outputs = embedder.run_batch([golden.token_ids[text] for text in texts])
    return dict(zip(texts, all_vectors(outputs), strict=True))


def _failure(
    bundle: Bundle,
    precision: Precision,
    layout: Layout,
    report: SelfTestReport,
    settings: RefinementSettings,
    open_reference: OpenReference,
) -> ExportError:
    """Return the error for a vector that is too far from PyTorch's, with what is likely behind it."""
    step = f"step {report.worst_step}" if report.worst_step else "the prompt"
    text = read_golden_vectors(bundle).texts[report.worst_text]
    return ExportError(
        f"the {precision} graph ({layout})",
        f"differs from PyTorch from {step} on, most there for {text!r}; smallest cosine {report.min_cosine:.6f}",
        f"at least {report.limit} is expected; nothing was published",
        _likely_cause(bundle, precision, report, settings, open_reference),
    )


def _likely_cause(
    bundle: Bundle,
    precision: Precision,
    report: SelfTestReport,
    settings: RefinementSettings,
    open_reference: OpenReference,
) -> str:
    spec = SPECS[precision]
    other = "float64" if spec.dtype == "float32" else spec.dtype
    theirs = _pytorch_cosine(bundle, other, settings, open_reference)
    if theirs is not None and not 1 - theirs < EXCUSE * (1 - report.min_cosine):  # NaN counts
        return (
            f"The model amplifies rounding: PyTorch's own float32 and {other} differ too, down to a cosine of "
            f"{theirs:.6f}, so no two programs give the same vectors. Fewer --steps may help; a trained adapter does."
        )
    if spec.calibrated:
        return "The model loses too much in 8 bits: calibrate with a smaller --max-drop, or export another precision."
    if report.worst_step == 0:
        return "A weight or a field of config.json is read in another way than by transformers: please report it."
    return "The prompt is right, the soft tokens are not: please report it with the model's config.json."


def _pytorch_cosine(
    bundle: Bundle, dtype: str, settings: RefinementSettings, open_reference: OpenReference
) -> float | None:
    """Return the smallest cosine between the golden vectors and PyTorch's in another precision.

    Returns:
        None for a model that does not fit into memory as a whole.
    """
    reference = open_reference()
    if not isinstance(reference, WholeReference):
        return None
    golden = read_golden_vectors(bundle)
    rows = tuple(range(len(golden.token_ids)))
    batch = pad_batch(rows, golden.token_ids, pad_token_id=bundle.manifest.pad_token_id)
    model = reference.model.to("cpu", getattr(torch, dtype))
    ids, mask = tensors_of(batch, model.device)
    states = step_states(model, ids, mask, steps=settings.steps, temperature=settings.temperature)
    vectors = l2_normalize(pool_states(states.float().numpy(), settings.pooling))
    return float(row_cosine(vectors, golden.vectors).min())
