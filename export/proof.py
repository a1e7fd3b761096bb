"""The proof of an export, before it is published: the runtime, on the staged bundle, gives PyTorch's vectors."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from gircse.checkpoint.available_memory import available_memory
from gircse.checkpoint.reference import Reference, WholeReference, step_states, tensors_of
from gircse.export.graph.builder import RefinementSettings
from gircse.reporting.progress import StageProgress
from gircse.reporting.sizes import gib
from gircse.runtime import Embedder
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import ExportError, GircseError
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import Float32, l2_normalize, pool_states, row_cosine
from gircse.runtime.ort_session import open_session
from gircse.runtime.precision import SPECS, Precision
from gircse.runtime.self_test import (
    GoldenVectors,
    SelfTestReport,
    all_vectors,
    compare_with_golden,
    read_golden_vectors,
)
from gircse.runtime.tokenization import pad_batch

SESSION_SHARES: Mapping[Precision, float] = {
    Precision.FP32: 2.0,
    Precision.FP16: 3.0,
    Precision.INT8: 1.5,
    Precision.INT8_WEIGHTS: 2.5,
}
"""Memory of a CPU session per byte of its weights (measured on the demo: 1.9, 2.7, 1.3 and 2.0). FP16 weights become
FP32 copies."""

CONVERTING_BYTES = 1 << 30
"""What such a session takes besides the weights that are being converted."""

BATCH_SECONDS, MAX_SECONDS = 120.0, 600.0
"""A graph whose golden texts would take longer than the first embeds them one by one, and no more of them after the
second."""

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
            session = SessionMemory.of(precision, weights=bundle.manifest.weight_bytes(name), embeddings=embeddings)
            if session.needed > (free := available_memory()):
                memory = f"that needs {gib(session.needed)} of memory, {gib(free)} is available"
                progress.note(f"  {precision} ({layout}) is not checked against PyTorch: {memory}")
                continue
            slowly = "" if session.copy_weights else ", slowly, because FP32 copies of the weights do not fit in memory"
            with progress.stage(f"check {precision} ({layout}) against PyTorch{slowly}"):
                report = _run(bundle, golden, precision, layout, copy_weights=session.copy_weights)
                if not report.passed:
                    raise _failure(bundle, precision, layout, report, settings, open_reference)
            checked[name][layout] = report.texts
            if report.texts < len(golden.texts):
                progress.note(f"  {report.texts} of {len(golden.texts)} texts: the others would have taken too long")
    return checked


@dataclass(frozen=True)
class SessionMemory:
    """What a session on the CPU takes.

    Attributes:
        needed: bytes.
        copy_weights: see ``load_graph``.
    """

    needed: int
    copy_weights: bool

    @classmethod
    def of(cls, precision: Precision, *, weights: int, embeddings: int) -> Self:
        """Choose how a precision runs here.

        Args:
            precision: of a variant.
            weights: bytes of its weights.
            embeddings: elements of the embedding table, its largest weight.
        """
        needed = int(SESSION_SHARES[precision] * weights)
        if precision is Precision.FP16 and needed > available_memory():
            return cls(2 * 4 * embeddings + CONVERTING_BYTES, copy_weights=False)
        return cls(needed, copy_weights=True)


def _run(
    bundle: Bundle, golden: GoldenVectors, precision: Precision, layout: Layout, *, copy_weights: bool
) -> SelfTestReport:
    # Not verified: the hashes were taken while the files were written.
    try:
        session = open_session(bundle, precision, layout=layout, copy_weights=copy_weights)
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
    """Embed the golden texts as one batch; where that would take long, one by one, as many as the time allows."""
    shortest_first = sorted(range(len(golden.texts)), key=lambda text: len(golden.token_ids[text]))
    start = time.perf_counter()
    vectors = {shortest_first[0]: _embed(embedder, golden.token_ids[shortest_first[0]])}
    if (time.perf_counter() - start) * len(golden.texts) < BATCH_SECONDS:
        return embedder.self_test()
    for text in shortest_first[1:]:
        if time.perf_counter() - start > MAX_SECONDS:
            break
        vectors[text] = _embed(embedder, golden.token_ids[text])
    texts = sorted(vectors)
    ours = np.concatenate([vectors[text] for text in texts])
    report = compare_with_golden(ours, golden.vectors[texts], precision=embedder.precision)
    return dataclasses.replace(report, worst_text=texts[report.worst_text])


def _embed(embedder: Embedder, token_ids: list[int]) -> Float32:
    """Return h_0 normalized and z_1..z_K (1, K + 1, hidden) float32 of a text."""
    ((_, outputs),) = embedder.run_batches([token_ids])
    return all_vectors(outputs)


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
