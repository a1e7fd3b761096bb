"""The export from end to end, as a list of stages. ``export_bundle`` is what ``gircse-export`` calls."""

import importlib.metadata
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from gircse.calibration.fingerprint import fingerprint_of
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.reference import load_reference
from gircse.export.golden import CASES as GOLDEN_CASES
from gircse.export.golden import write_golden
from gircse.export.graph.mixed_precision import onnx_dtype
from gircse.export.graph.simplify import simplify_decoder
from gircse.export.graph.trace import trace_decoder
from gircse.export.int8.quantize import OpenedCalibration
from gircse.export.model_source import SourceModel, open_source
from gircse.export.options import ExportOptions
from gircse.export.overflow_probe import largest_magnitudes
from gircse.export.overflow_report import overflow_risks, write_magnitudes
from gircse.export.proof import check_runtime, prove_bundle
from gircse.export.staging import check_destination, staged_directory
from gircse.export.variants import DecoderGraph, VariantDraft, draft_variant, write_variant
from gircse.reporting.progress import Advance, StageProgress
from gircse.reporting.sizes import gib
from gircse.runtime.bundle import file_sha256
from gircse.runtime.errors import ExportError, OptionError, OutputError, readable
from gircse.runtime.manifest import MANIFEST_NAME, SCHEMA_VERSION, FileEntry, Manifest, Variant
from gircse.runtime.precision import SPECS, Precision
from gircse.runtime.text_files import read_texts
from gircse.runtime.tokenization import TokenBatch, padded_batches

TOOLS = ("gircse-deploy", "torch", "transformers", "peft", "onnx", "onnxscript", "onnx-ir", "safetensors", "tokenizers")

TRACE_BYTES = 1 << 30
"""Memory of torch, transformers and the graphs while nothing else is held (measured: 0.8 GiB on 28 layers)."""

REFERENCE_BYTES = 1 << 28
"""What the PyTorch reference takes on top of its weights."""

PROBE_BATCH, PROBE_BATCH_TOKENS = 16, 2048
"""Texts and tokens of a batch of the overflow probe."""

MOST_RISKS = 10
"""Overflow risks that are shown one by one."""

SMALL_FILES_BYTES = 64 << 20
"""Disk space for everything in a bundle but the weights."""


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
    calibration = _open_calibration(options)
    probe_texts = read_texts(options.probe_texts) if options.probe_texts else [text for _, text in GOLDEN_CASES]
    with progress.stage(f"find the model {options.model}"):
        source = open_source(options)
    for note in source.notes:
        progress.note(f"  {readable(note)}")
    if calibration is not None:
        calibration.calibration.check(fingerprint_of(source.checkpoint, options), calibration.path)
    golden_missing_reason = _check_resources(source.weights, options.precisions, output, progress)
    drafts = _draft_variants(options, source, calibration, progress)
    try:
        with staged_directory(output, force=options.force) as directory:
            variants, files = _write_variants(directory, drafts, options, source, progress)
            if golden_missing_reason is None:
                _use_reference(directory, options, source, probe_texts, progress)
            with progress.stage("hash the files"):
                _write_manifest(directory, variants, options, source, files, golden_missing_reason)
            if golden_missing_reason is None:
                prove_bundle(
                    directory,
                    options.settings,
                    weight_bytes=source.weights.total_bytes,
                    load_model=lambda: load_reference(source.checkpoint, steps=options.steps),
                    progress=progress,
                )
    except OSError as err:
        raise OutputError(
            f"--output {output}",
            f"cannot be written: {err.strerror or err}",
            "nothing was left behind",
            "Free some space, or choose another --output.",
        ) from err
    return output


def _open_calibration(options: ExportOptions) -> OpenedCalibration | None:
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
            draft_variant(precision, decoder, keep_float32=options.keep_float32, calibration=calibration)
            for precision in options.precisions
        ]


def _check_resources(
    weights: ModelWeights, precisions: Sequence[Precision], output: Path, progress: StageProgress
) -> str | None:
    """Compare what the export needs with what is free, and say so, before anything expensive starts.

    Returns:
        Why the golden vectors cannot be computed, or None if they can.

    Raises:
        OutputError: the disk is too small.
        ExportError: memory does not suffice.
    """
    total, largest = weights.total_bytes, weights.largest_read_bytes
    parent = next(path for path in output.parents if path.exists())
    written = sum(total * _bytes_per_weight(precision) // 4 for precision in precisions)
    disk_needed, disk_free = written + SMALL_FILES_BYTES, shutil.disk_usage(parent).free
    memory_needed, memory_free = TRACE_BYTES + 3 * largest, psutil.virtual_memory().available
    # PEFT merges layer by layer, and copies what an adapter stores whole.
    reference_needed = TRACE_BYTES + REFERENCE_BYTES + int(1.2 * total) + 2 * weights.adapter_bytes
    progress.note(
        f"  needs {gib(disk_needed)} of disk ({gib(disk_free)} free) and {gib(memory_needed)} of memory, "
        f"{gib(reference_needed)} with golden vectors ({gib(memory_free)} available)"
    )
    if disk_needed > disk_free:
        raise OutputError(
            f"--output {output}",
            f"has {gib(disk_free)} of free disk space",
            f"the bundle needs {gib(disk_needed)}",
            "Free some space, or choose another disk.",
        )
    if memory_needed > memory_free:
        raise ExportError(
            "memory",
            f"has {gib(memory_free)} available",
            f"the export needs {gib(memory_needed)}",
            "Close other programs.",
        )
    if reference_needed > memory_free:
        reason = f"the PyTorch reference needs {gib(reference_needed)} of memory, {gib(memory_free)} were available"
        probe = ", no overflow probe of FP16" if Precision.FP16 in precisions else ""
        progress.note(f"  no golden vectors{probe}: {reason}")
        return reason
    return None


def _bytes_per_weight(precision: Precision) -> int:
    # INT8 variants hold the vocabulary twice, and scales: less than two bytes a weight.
    return 2 if SPECS[precision].calibrated else int(onnx_dtype(precision).itemsize)


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
    variants, files = {}, {}
    for draft in drafts:
        total = draft.weights.total_bytes
        with progress.stage(f"write {gib(total)} of {draft.precision} weights", total=total) as advance:
            written = write_variant(draft, directory, identity=source.facts.identity, on_bytes=advance)
        variants[str(draft.precision)], files[draft.weights_path] = written.variant, written.entry
        if written.engine_missing_reason is not None:
            progress.note(f"  no graph for TensorRT of {draft.precision}: {written.engine_missing_reason}")
        if SPECS[draft.precision].calibrated and options.calibration is not None:
            shutil.copyfile(options.calibration, directory / draft.precision / "calibration.json")
    (directory / "tokenizer.json").write_text(source.tokenizer.content, encoding="utf-8")
    return variants, files


def _use_reference(
    directory: Path, options: ExportOptions, source: SourceModel, probe_texts: Sequence[str], progress: StageProgress
) -> None:
    """Compute what the bundle has from PyTorch: golden vectors, and the magnitudes that FP16 must hold."""
    with progress.stage("load the PyTorch reference"):
        model = load_reference(source.checkpoint, steps=options.steps)
    with progress.stage("compute golden vectors"):
        write_golden(directory, model, source.prompts, options.settings)
    if Precision.FP16 not in options.precisions:
        return
    token_ids, _ = source.prompts.tokenize(probe_texts)
    with progress.stage(f"probe {len(token_ids)} texts for FP16 overflow", total=len(token_ids)) as advance:
        batches = padded_batches(
            token_ids, pad_token_id=source.prompts.pad_token_id, batch_size=PROBE_BATCH, batch_tokens=PROBE_BATCH_TOKENS
        )
        magnitudes = largest_magnitudes(
            model, _counted(batches, advance), steps=options.steps, temperature=options.temperature
        )
    write_magnitudes(directory / Precision.FP16 / "magnitudes.json", magnitudes, texts=len(token_ids))
    risks = overflow_risks(magnitudes, keep_float32=options.keep_float32, tied=source.shape.tied)
    for risk in risks[:MOST_RISKS]:
        progress.note(f"  warning: {risk}")
    if len(risks) > MOST_RISKS:
        progress.note(f"  warning: and {len(risks) - MOST_RISKS} more: see fp16/magnitudes.json")


def _counted(batches: Iterable[TokenBatch], advance: Advance) -> Iterator[TokenBatch]:
    for batch in batches:
        yield batch
        advance(len(batch.rows))


def _write_manifest(
    directory: Path,
    variants: Mapping[str, Variant],
    options: ExportOptions,
    source: SourceModel,
    files: dict[str, FileEntry],
    golden_missing_reason: str | None,
) -> None:
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in files:
            files[name] = FileEntry(path.stat().st_size, file_sha256(path))
    manifest = Manifest(
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
    (directory / MANIFEST_NAME).write_bytes(manifest.to_json())
