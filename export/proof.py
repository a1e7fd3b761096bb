"""The proof of an export, before it is published: the runtime, on the staged bundle, gives PyTorch's vectors."""

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from gircse.checkpoint.reference import Reference, WholeReference, step_states, tensors_of
from gircse.export.graph.builder import RefinementSettings
from gircse.reporting.progress import StageProgress
from gircse.reporting.sizes import gib
from gircse.runtime import Embedder
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import ExportError, GircseError
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import l2_normalize, pool_states, row_cosine
from gircse.runtime.precision import SPECS, Precision
from gircse.runtime.provider import Provider
from gircse.runtime.self_test import SelfTestReport, read_golden_vectors
from gircse.runtime.tokenization import pad_batch

SESSION_BYTES_PER_BYTE = 2.0
"""Memory of a session per byte of FP32 weights, which are mapped and, but for the vocabulary, packed (measured: 1.9 on
the demo)."""

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
    directory: Path,
    settings: RefinementSettings,
    *,
    weight_bytes: int,
    open_reference: OpenReference,
    progress: StageProgress,
) -> None:
    """Run every graph that the CPU runs, and compare every step of the golden texts with PyTorch's vectors.

    Args:
        directory: the staged bundle, complete.
        settings: K, pooling, temperature.
        weight_bytes: of the model in FP32.
        open_reference: is asked for the reference again only if a graph fails, to find out why.
        progress: where to show the stages.

    Raises:
        ExportError: a graph cannot be run, or a vector is too far from PyTorch's.
    """
    bundle = Bundle.open(directory)
    needed = int(SESSION_BYTES_PER_BYTE * weight_bytes)
    for name, variant in bundle.manifest.variants.items():
        precision = Precision(name)
        for layout in variant.graphs if SPECS[precision].cpu else ():
            if needed > (free := psutil.virtual_memory().available):
                memory = f"that needs {gib(needed)} of memory, {gib(free)} is available"
                progress.note(f"  {precision} ({layout}) is not checked against PyTorch: {memory}")
                continue
            with progress.stage(f"check {precision} ({layout}) against PyTorch"):
                report = _run(directory, precision, layout)
                if not report.passed:
                    raise _failure(bundle, precision, layout, report, settings, open_reference)


def _run(directory: Path, precision: Precision, layout: Layout) -> SelfTestReport:
    try:
        with Embedder(
            directory, precision=precision, provider=Provider.CPU, layout=layout, verify=False
        ) as embedder:  # not verified: the hashes were taken while the files were written
            return embedder.self_test()
    except GircseError as err:
        raise ExportError(
            f"the {precision} graph ({layout})",
            f"cannot be run by ONNX Runtime: {err}",
            "nothing was published",
            "This is a fault of the export: please report it with the model's config.json.",
        ) from err


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
