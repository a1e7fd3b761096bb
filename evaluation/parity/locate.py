"""Find the layers and steps in which variants of a bundle depart from the reference, each on its worst text."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from gircse.checkpoint.reference_choice import ReferenceOptions
from gircse.checkpoint.source import Checkpoint
from gircse.evaluation.parity.backends import BundleBackend, TokenIds, TorchBackend, candidate_backend
from gircse.evaluation.parity.batches import side_batches
from gircse.evaluation.parity.layer_errors import compare_layers
from gircse.evaluation.parity.layer_trace import LayerTrace
from gircse.evaluation.parity.options import ParityOptions
from gircse.evaluation.parity.references import source_checkpoint
from gircse.evaluation.parity.report_schema import CandidateReport, LayerReport
from gircse.evaluation.parity.side_process import load_result, run_side
from gircse.reporting.progress import StageProgress
from gircse.runtime.bundle import Bundle
from gircse.runtime.provider import Provider
from gircse.runtime.trt.library import MODULES


def locate_departures(
    options: ParityOptions,
    bundle: Bundle,
    reference: tuple[Bundle, str] | None,
    reports: Sequence[CandidateReport],
    token_ids: TokenIds,
    scratch: Path,
    progress: StageProgress,
) -> list[CandidateReport]:
    """Add the errors of the layers to the report of each variant.

    Args:
        options: of the run.
        bundle: the bundle.
        reference: bundle and precision of the reference; None is PyTorch.
        reports: of the variants, without layers.
        token_ids: token ids of each text.
        scratch: a folder for what the sides compute.
        progress: where the stages are shown.

    Raises:
        GircseError: a graph has no names for its layers, or a value is not finite.
    """
    worst = [min(range(len(token_ids)), key=lambda row: min(report.texts[row].cosine)) for report in reports]
    texts = sorted(set(worst))
    folder = scratch / "reference-layers"
    _trace_reference(options, bundle, reference, [token_ids[row] for row in texts], folder, progress)
    located = []
    for report, row in zip(reports, worst, strict=True):
        backend = candidate_backend(options, bundle, report.precision)
        if options.provider not in (Provider.CPU, Provider.CUDA) and not backend.layers_in_engine:
            progress.note(f"  {_no_layers(options.provider)}: those of its graph are compared, on the CPU")
        place = scratch / f"{report.precision}-layers"
        layers = run_side(
            backend.name,
            place,
            progress,
            compute_layer_errors,
            backend,
            bundle,
            token_ids[row],
            text=row,
            reference=folder,
            index=texts.index(row),
        )
        located.append(msgspec.structs.replace(report, layers=layers))
    return located


def _no_layers(provider: Provider) -> str:
    """Say why the layers of an engine are not compared."""
    if provider not in MODULES:
        return "the engine inside ONNX Runtime shows no layers"
    return f"no engine shows its layers (gircse-build --provider {provider} --layer-outputs builds one)"


def _trace_reference(
    options: ParityOptions,
    bundle: Bundle,
    reference: tuple[Bundle, str] | None,
    token_ids: TokenIds,
    folder: Path,
    progress: StageProgress,
) -> None:
    """Trace texts through the layers of the reference, and keep that in a folder."""
    if reference is not None:
        backend = BundleBackend(*reference, threads=options.threads)
        run_side(backend.name, folder, progress, trace_bundle_reference, backend, reference[0], token_ids)
        return
    run_side(
        "the PyTorch model",
        folder,
        progress,
        trace_torch_reference,
        bundle,
        source_checkpoint(bundle.manifest, model=options.model, adapter=options.adapter),
        token_ids,
        options=options.reference_options,
        threads=options.threads,
    )


def trace_torch_reference(
    progress: StageProgress,
    bundle: Bundle,
    checkpoint: Checkpoint,
    token_ids: TokenIds,
    *,
    options: ReferenceOptions,
    threads: int | None,
) -> list[LayerTrace]:
    """Return what the layers of the PyTorch model pass on, of each text; called in a process of its own."""
    with progress.stage("trace the layers of the PyTorch model", total=len(token_ids)) as advance:
        backend = TorchBackend(bundle, checkpoint, options, threads=threads)
        traces = []
        for ids in token_ids:
            traces.append(backend.trace_layers(ids))
            advance(1)
    return traces


def trace_bundle_reference(
    progress: StageProgress, backend: BundleBackend, bundle: Bundle, token_ids: TokenIds
) -> list[LayerTrace]:
    """Return what the layers of a variant pass on, of each text; called in a process of its own."""
    with progress.stage(f"trace the layers of {backend.name}"):
        probe = backend.open_layer_probe()
        return [probe.trace(batch) for ids in token_ids for batch in side_batches([ids], bundle.manifest)]


def compute_layer_errors(
    progress: StageProgress,
    backend: BundleBackend,
    bundle: Bundle,
    token_ids: list[int],
    *,
    text: int,
    reference: Path,
    index: int,
) -> LayerReport:
    """Return the errors of the layers of a variant on one text; called in a process of its own.

    Args:
        progress: where the stage is shown.
        backend: the variant.
        bundle: which has it.
        token_ids: of the text.
        text: its number.
        reference: folder with the traces of the reference.
        index: which of them is the text's.
    """
    with progress.stage(f"locate the error in {backend.name}, text {text}"):
        wanted: LayerTrace = load_result(reference)[index]
        probe = backend.open_layer_probe()
        (batch,) = side_batches([token_ids], bundle.manifest)
        running, alone = probe.trace(batch), probe.trace(batch, forced=wanted)
        return compare_layers(backend.name, text, reference=wanted, running=running, alone=alone)
