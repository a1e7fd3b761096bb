"""The proof of an export, before it is published: the runtime, on the staged bundle, gives PyTorch's vectors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from gircse.checkpoint.reference import step_states
from gircse.export.graph.builder import RefinementSettings
from gircse.reporting.progress import StageProgress
from gircse.reporting.sizes import gib
from gircse.runtime import Embedder
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import ExportError, GircseError
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import Float32, l2_normalize, pool_states, row_cosine
from gircse.runtime.precision import SPECS, Precision
from gircse.runtime.provider import Provider
from gircse.runtime.self_test import SelfTestReport, read_golden_vectors
from gircse.runtime.tokenization import pad_batch

SESSION_BYTES_PER_BYTE = 2.5
"""Memory of a session for each byte of FP32 weights: ONNX Runtime packs a second copy of what it multiplies with."""

EXCUSE = 0.1
"""A model amplifies rounding if PyTorch itself, in another precision, misses a tenth of what the export missed."""

LoadModel = Callable[[], Any]
"""Loads the PyTorch reference, in FP32."""


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
    directory: Path, settings: RefinementSettings, *, weight_bytes: int, load_model: LoadModel, progress: StageProgress
) -> None:
    """Run every graph that the CPU runs, and compare every step of the golden texts with PyTorch's vectors.

    Args:
        directory: the staged bundle, complete.
        settings: K, pooling, temperature.
        weight_bytes: of the model in FP32.
        load_model: is asked for the reference again only if a graph fails, to find out why.
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
                    raise _failure(bundle, precision, layout, report, settings, load_model)


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
    load_model: LoadModel,
) -> ExportError:
    """Return the error for a vector that is too far from PyTorch's, with what is likely behind it."""
    step = f"step {report.worst_step}" if report.worst_step else "the prompt"
    text = read_golden_vectors(bundle).texts[report.worst_text]
    return ExportError(
        f"the {precision} graph ({layout})",
        f"differs from PyTorch in {step} of the text {text!r}: cosine {report.min_cosine:.6f}",
        f"at least {report.limit} is expected; nothing was published",
        _likely_cause(bundle, precision, report, settings, load_model),
    )


def _likely_cause(
    bundle: Bundle, precision: Precision, report: SelfTestReport, settings: RefinementSettings, load_model: LoadModel
) -> str:
    spec = SPECS[precision]
    other = "float64" if spec.dtype == "float32" else spec.dtype
    theirs = _pytorch_cosine(bundle, report.worst_text, report.worst_step, other, settings, load_model)
    if not 1 - theirs < EXCUSE * (1 - report.min_cosine):  # NaN counts
        return (
            f"The model amplifies rounding: PyTorch's own FP32 and {other} differ as much there, by a cosine of "
            f"{theirs:.6f}, so no two programs give the same vectors. Fewer --steps or a trained adapter may help."
        )
    if spec.calibrated:
        return (
            "The model loses too much in 8 bits. Calibrate with a smaller --max-drop or on more texts, or export "
            "another precision."
        )
    if report.worst_step == 0:
        return "A weight or a field of config.json is read differently by the export: please report it."
    return "The prompt is right, the soft tokens are not: please report it with the model's config.json."


def _pytorch_cosine(
    bundle: Bundle, text: int, step: int, dtype: str, settings: RefinementSettings, load_model: LoadModel
) -> float:
    """Return the cosine between PyTorch's FP32 vector and PyTorch's vector in another precision."""
    golden = read_golden_vectors(bundle)
    batch = pad_batch((text,), golden.token_ids, pad_token_id=bundle.manifest.pad_token_id)
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    model = load_model().to(getattr(torch, dtype))
    states = step_states(model, ids, mask, steps=settings.steps, temperature=settings.temperature)
    vectors: Float32 = l2_normalize(pool_states(states.double().numpy().astype(np.float32), settings.pooling))
    return float(row_cosine(vectors[0, step], golden.vectors[text, step]))
