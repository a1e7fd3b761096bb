"""The export from end to end, as a list of stages. ``export_bundle`` is what ``gircse-export`` calls."""

import functools
import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from gircse.calibration.fingerprint import fingerprint_of
from gircse.checkpoint.available_memory import available_memory
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.reference_choice import ReferenceBudget, open_reference
from gircse.export.golden import golden_batch, write_golden
from gircse.export.graph.simplify import simplify_decoder
from gircse.export.graph.trace import trace_decoder
from gircse.export.int8.quantize import OpenedCalibration
from gircse.export.model_source import SourceModel, open_source
from gircse.export.options import ExportOptions
from gircse.export.overflow_probe import MagnitudeRecorder, Magnitudes
from gircse.export.overflow_report import fp16_variants, overflow_risks, write_magnitudes
from gircse.export.proof import OpenReference, check_runtime, prove_bundle
from gircse.export.resources import ExportNeeds, check_disk, free_disk
from gircse.export.staging import check_destination, staged_directory
from gircse.export.variants import DecoderGraph, VariantDraft, draft_variant, write_variant
from gircse.reporting.progress import StageProgress, Unit
from gircse.reporting.sizes import duration, gib, peak_memory
from gircse.runtime.batch_planner import TokenBatch, padded_batches
from gircse.runtime.bundle import file_sha256
from gircse.runtime.errors import OptionError, OutputError, readable
from gircse.runtime.manifest import MANIFEST_NAME, SCHEMA_VERSION, FileEntry, Manifest, Variant
from gircse.runtime.precision import SPECS, Precision
from gircse.runtime.text_files import read_texts

TOOLS = ("gircse-deploy", "torch", "transformers", "peft", "onnx", "onnxscript", "onnx-ir", "safetensors", "tokenizers")


PROBE_BATCH, PROBE_BATCH_TOKENS = 16, 2048
"""Texts and tokens of a batch of the overflow probe."""

MOST_RISKS = 10
"""Overflow risks that are shown one by one."""


def export_bundle(options: ExportOptions, *, progress: StageProgress | None = None) -> Path:
    """Export a checkpoint to a bundle.

    Args:
        options: what to export, and how.
        progress: where to show the stages; None makes one on stderr.

    Returns:
        The bundle's directory.

    Raises:
        CheckpointError: model, adapter or tokenizer cannot be used.
        CalibrationError: the calibration cannot be used, or belongs to another model.
        OptionError: an option is out of range, or does not fit the model.
        OutputError: the destination is taken or cannot be written, or the disk is too small.
        ExportError: the model cannot be exported, or memory does not suffice.
    """
    progress = progress or StageProgress()
    output = options.output.absolute()
    check_runtime()
    check_destination(output, force=options.force)
    calibration = open_calibration(options)
    probe_texts = read_texts(options.probe_texts) if options.probe_texts else []
    with progress.stage(f"find the model {options.model}"):
        source = open_source(options)
    for note in source.notes:
        progress.note(f"  {readable(note)}")
    if calibration is not None:
        calibration.calibration.check(fingerprint_of(source.checkpoint, options), calibration.path)
    _check_resources(source.weights, options.precisions, output, progress)
    budget = ReferenceBudget.of(source.weights, source.config, options.reference)
    golden_missing_reason = _golden_missing_reason(budget, options, progress)
    open_budgeted = functools.partial(
        open_reference, source.checkpoint, options.reference, steps=options.steps, budget=budget
    )
    drafts = _draft_variants(options, source, calibration, progress)
    try:
        with staged_directory(output, force=options.force) as directory:
            variants, files = _write_variants(directory, drafts, options, source, progress)
            if golden_missing_reason is None:
                _use_reference(directory, options, source, open_budgeted, probe_texts, progress)
            with progress.stage("hash the files"):
                manifest = _manifest(directory, variants, options, source, files, golden_missing_reason)
            (directory / MANIFEST_NAME).write_bytes(manifest.to_json())
            # Not after the check, where a file that a session maps counts as often as its weights are used.
            progress.note(f"  peak memory {gib(peak_memory())} so far")
            if golden_missing_reason is None:
                checked = prove_bundle(
                    directory,
                    options.settings,
                    open_reference=open_budgeted,
                    progress=progress,
                )
                (directory / MANIFEST_NAME).write_bytes(manifest.with_checked(checked).to_json())
    except OSError as err:
        raise OutputError(
            f"--output {output}",
            f"cannot be written: {err.strerror or err}",
            "nothing was left behind",
            "Free some space, or choose another --output.",
        ) from err
    return output


def open_calibration(options: ExportOptions) -> OpenedCalibration | None:
    """Open the calibration of INT8 variants, before anything expensive starts."""
    if options.calibration is not None:
        return OpenedCalibration.open(options.calibration)
    for precision in options.precisions:
        if SPECS[precision].calibrated:
            raise OptionError(
                f"--precision {precision}",
                "needs a --calibration",
                None,
                f"Make one: gircse-calibrate --steps {options.steps} --model {options.model} --texts FILE, "
                "then add --calibration calibration.json.",
            )
    return None


def _draft_variants(
    options: ExportOptions, source: SourceModel, calibration: OpenedCalibration | None, progress: StageProgress
) -> list[VariantDraft]:
    """Trace, compose and match the weights; nothing is written yet."""
    with progress.stage(f"trace the {source.shape.architecture} decoder ({source.shape.num_layers} layers)"):
        graph = trace_decoder(source.config, source.shape, positions=options.max_tokens + options.steps)
        simplify_decoder(graph)
    decoder = DecoderGraph(graph, source.shape, options.settings, source.facts, source.weights)
    with progress.stage(
        f"compose {options.steps} refinement steps ({options.layout}, {', '.join(options.precisions)})"
    ):
        return [
            draft_variant(
                precision,
                decoder,
                keep_float32=options.keep_float32,
                calibration=calibration,
                max_shard_bytes=options.max_shard_bytes,
            )
            for precision in options.precisions
        ]


def _check_resources(
    weights: ModelWeights, precisions: Sequence[Precision], output: Path, progress: StageProgress
) -> None:
    """Compare what the export needs with what is free, and say so, before anything expensive starts.

    Raises:
        OutputError: the disk is too small.
        ExportError: memory does not suffice.
    """
    needs = ExportNeeds.of(weights, precisions)
    progress.note(
        f"  needs {gib(needs.disk)} of disk ({gib(free_disk(output))} free) and {gib(needs.memory)} of memory "
        f"({gib(available_memory())} available), PyTorch's vectors not counted"
    )
    check_disk(f"--output {output}", "the bundle", output, needs.disk)
    needs.check_memory()


def _golden_missing_reason(budget: ReferenceBudget, options: ExportOptions, progress: StageProgress) -> str | None:
    """Return why the golden vectors cannot be computed, or None if they can."""
    if budget.shortage is None:
        return None
    reason = f"the PyTorch reference {budget.shortage}"
    probe = ", no overflow probe of FP16" if fp16_variants(options.precisions) else ""
    progress.note(f"  no golden vectors{probe}: {reason}")
    return reason


def _write_variants(
    directory: Path,
    drafts: Sequence[VariantDraft],
    options: ExportOptions,
    source: SourceModel,
    progress: StageProgress,
) -> tuple[dict[str, Variant], dict[str, FileEntry]]:
    """Write weights, graphs and tokenizer.

    Returns:
        The variants by precision, and the entries of their weights, which were hashed while they were written.
    """
    variants: dict[str, Variant] = {}
    files: dict[str, FileEntry] = {}
    for draft in drafts:
        total = draft.weights.total_bytes
        with progress.stage(
            f"write {gib(total)} of {draft.precision} weights", total=total, unit=Unit.BYTES
        ) as advance:
            written = write_variant(draft, directory, identity=source.facts.identity, on_bytes=advance)
        variants[str(draft.precision)] = written.variant
        files |= written.entries
        if written.engine_missing_reason is not None:
            progress.note(f"  no graph for TensorRT of {draft.precision}: {written.engine_missing_reason}")
        if SPECS[draft.precision].calibrated and options.calibration is not None:
            shutil.copyfile(options.calibration, directory / draft.precision / "calibration.json")
    (directory / "tokenizer.json").write_text(source.tokenizer.content, encoding="utf-8")
    return variants, files


def _use_reference(
    directory: Path,
    options: ExportOptions,
    source: SourceModel,
    open_reference: OpenReference,
    probe_texts: Sequence[str],
    progress: StageProgress,
) -> None:
    """Compute what the bundle has from PyTorch: golden vectors, and the magnitudes that FP16 must hold.

    One run serves both, because a streamed reference takes as long for one batch as for a few.
    """
    with progress.stage("load the PyTorch reference"):
        reference = open_reference()
    golden, is_probed = golden_batch(source.prompts), bool(fp16_variants(options.precisions))
    probed = _probe_batches(source, probe_texts) if is_probed else []
    batches = [golden, *probed]
    for note in reference.notes:
        progress.note(f"  {note}")
    if (seconds := reference.estimate_seconds(batches, steps=options.steps)) is not None:
        progress.note(f"  PyTorch's vectors will take about {duration(seconds)}")
    states = np.empty((len(golden.rows), options.steps + 1, source.shape.hidden_size), np.float32)
    recorder = MagnitudeRecorder(options.steps)
    texts = sum(len(batch.rows) for batch in batches)
    title = "compute golden vectors" + (f", and probe {texts} texts for FP16 overflow" if is_probed else "")
    with (
        progress.stage(title, total=texts) as advance,
        recorder.recording(reference.model) if is_probed else nullcontext(),
    ):
        for state in reference.refine(batches, steps=options.steps, temperature=options.temperature, advance=advance):
            recorder.after(state.step)
            if state.batch == 0:
                states[:, state.step] = state.hidden.float().cpu().numpy()
    if reference.bytes_read:
        progress.note(f"  read {gib(reference.bytes_read)} of weights in {options.steps + 1} sweeps over the layers")
    write_golden(directory, golden, states, options.pooling)
    if is_probed:
        _report_magnitudes(directory, options, source, recorder.found, texts, progress)


def _probe_batches(source: SourceModel, probe_texts: Sequence[str]) -> Sequence[TokenBatch]:
    """Return the texts of the overflow probe besides the golden ones, as batches."""
    token_ids, _ = source.prompts.tokenize(probe_texts)
    return list(
        padded_batches(
            token_ids, pad_token_id=source.prompts.pad_token_id, batch_size=PROBE_BATCH, batch_tokens=PROBE_BATCH_TOKENS
        )
    )


def _report_magnitudes(
    directory: Path,
    options: ExportOptions,
    source: SourceModel,
    magnitudes: Magnitudes,
    texts: int,
    progress: StageProgress,
) -> None:
    names = fp16_variants(options.precisions)
    for name in names:
        write_magnitudes(directory / name / "magnitudes.json", magnitudes, texts=texts)
    risks = overflow_risks(magnitudes, keep_float32=options.keep_float32, tied=source.shape.tied)
    for risk in risks[:MOST_RISKS]:
        progress.note(f"  warning: {risk}")
    if len(risks) > MOST_RISKS:
        progress.note(f"  warning: and {len(risks) - MOST_RISKS} more: see {names[0]}/magnitudes.json")


def _manifest(
    directory: Path,
    variants: Mapping[str, Variant],
    options: ExportOptions,
    source: SourceModel,
    files: dict[str, FileEntry],
    golden_missing_reason: str | None,
) -> Manifest:
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in files:
            files[name] = FileEntry(path.stat().st_size, file_sha256(path))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=source.checkpoint.model,
        adapter=source.checkpoint.adapter,
        graph=source.facts,
        prompt_template=source.prompts.template,
        pad_token_id=source.prompts.pad_token_id,
        variants=variants,
        golden=golden_missing_reason is None,
        golden_missing_reason=golden_missing_reason,
        tools={name: importlib.metadata.version(name) for name in TOOLS},
        files=dict(sorted(files.items())),
        query_instruction=options.query_instruction,
        tokenizer=options.tokenizer,
        prompt_suffix=source.prompts.prompt_suffix,
        truncation_side=source.prompts.truncation_side,
    )
