"""The export from end to end, as a list of stages. ``export_bundle`` is what ``gircse-export`` calls."""

import importlib.metadata
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import psutil
from tokenizers import Tokenizer

from gircse.calibration.checkpoint import Checkpoint, pad_token_id, read_json, resolve_checkpoint
from gircse.calibration.progress import StageProgress
from gircse.export.architecture import DecoderShape, check_limits, decoder_shape
from gircse.export.compose import RefinementSettings, compose_graph, weight_initializers
from gircse.export.golden import write_golden
from gircse.export.precision import DTYPES, FLOAT32_ISLANDS, set_precision
from gircse.export.safetensors_index import SafetensorsIndex
from gircse.export.simplify import simplify_decoder
from gircse.export.staging import check_destination, staged_directory
from gircse.export.trace import trace_decoder
from gircse.export.weights import WeightPlan, estimate_bytes, external_tensors, write_weights
from gircse.runtime import io_spec
from gircse.runtime.bundle import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    FileEntry,
    GraphFacts,
    GraphFile,
    Layout,
    Manifest,
    Pooling,
    Precision,
    TensorSpec,
    Variant,
    file_sha256,
)
from gircse.runtime.errors import CheckpointError, ExportError
from gircse.runtime.token_batch import PROMPT_TEMPLATE, load_tokenizer

GRAPH_FILES = {Layout.UNROLLED: "model.onnx", Layout.STEPWISE: "stepwise.onnx"}
WEIGHTS_FILE = "weights.bin"
TOOLS = ("gircse-deploy", "torch", "transformers", "peft", "onnx", "onnxscript", "onnx-ir", "safetensors", "tokenizers")

TRACE_BYTES = 1 << 30
"""Memory of torch, transformers and the graphs while nothing else is held (measured: 0.8 GiB on 28 layers)."""

REFERENCE_BYTES = 1 << 28
"""What the PyTorch reference takes on top of its weights."""

SMALL_FILES_BYTES = 64 << 20
"""Room for everything in a bundle but the weights."""


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how; the fields are the flags of ``gircse-export``.

    Attributes:
        output: directory of the bundle.
        steps: K, 0 to 64.
        model: ``demo``, a local directory or a Hugging Face id.
        adapter: directory or Hugging Face id of a LoRA, ``none``, or None for the model's default.
        revision: revision of a Hugging Face model.
        pooling: ``mean`` or ``last``.
        temperature: divisor of the logits.
        max_tokens: longest prompt.
        layout: ``unrolled``, which brings the stepwise graph along, or ``stepwise`` alone.
        precisions: the variants to write.
        keep_float32: parts of weight names whose matrix products stay in FP32 in every variant.
        force: replace an existing bundle.
    """

    output: Path
    steps: int
    model: str = "demo"
    adapter: str | None = None
    revision: str | None = None
    pooling: Pooling = Pooling.MEAN
    temperature: float = 1.0
    max_tokens: int = 512
    layout: Layout = Layout.UNROLLED
    precisions: tuple[Precision, ...] = (Precision.FP32,)
    keep_float32: tuple[str, ...] = ()
    force: bool = False

    def __post_init__(self) -> None:
        """Take plain strings for the enums; a ``ValueError`` names what they may be."""
        object.__setattr__(self, "pooling", Pooling(self.pooling))
        object.__setattr__(self, "layout", Layout(self.layout))
        object.__setattr__(self, "precisions", tuple(dict.fromkeys(map(Precision, self.precisions))))

    @property
    def settings(self) -> RefinementSettings:
        """The part that the graphs compute."""
        return RefinementSettings(self.steps, self.pooling, self.temperature)


@dataclass(frozen=True)
class _Variant:
    """One precision, planned: its graphs by layout, how often each rewrite applied, and its weights."""

    precision: Precision
    graphs: Mapping[Layout, ir.Model]
    rewrites: Mapping[Layout, Mapping[str, int]]
    plan: WeightPlan


@dataclass(frozen=True)
class _Source:
    """The checkpoint with what was read from its small files and from the headers of its shards."""

    checkpoint: Checkpoint
    weights: SafetensorsIndex
    config: Any
    shape: DecoderShape
    tokenizer: Tokenizer
    pad_token_id: int


def export_bundle(options: ExportOptions, *, progress: StageProgress | None = None) -> Path:
    """Export a checkpoint to a bundle.

    Args:
        options: what to export, and how.
        progress: where to show the stages; None makes one on stderr.

    Returns:
        The bundle's directory.

    Raises:
        CheckpointError: model, adapter or tokenizer cannot be used.
        ExportError: an option is out of range, the destination is taken, or memory or disk do not suffice.
    """
    progress = progress or StageProgress()
    output = options.output.absolute()
    if not options.temperature > 0 or options.temperature == float("inf"):
        raise ExportError(f"--temperature {options.temperature} | a finite number above 0 | 1 is the trained value")
    check_destination(output, force=options.force)
    with progress.stage(f"find the model {options.model}"):
        source = _open_source(options)
    golden_missing_reason = _check_resources(source.weights, options.precisions, output, progress)
    variants = _trace_and_plan(options, source, progress)
    try:
        with staged_directory(output, force=options.force) as directory:
            files = _write_variants(directory, variants, options, source, progress)
            if golden_missing_reason is None:
                _write_golden(directory, options, source, progress)
            with progress.stage("hash the files"):
                _write_manifest(directory, variants, options, source, files, golden_missing_reason)
    except OSError as err:
        raise ExportError(
            f"--output {output}: {err.strerror or err} | room and permission to write | nothing was left behind: free "
            "some space or choose another --output"
        ) from err
    return output


def _open_source(options: ExportOptions) -> _Source:
    from transformers import AutoConfig

    checkpoint = resolve_checkpoint(options.model, adapter=options.adapter, revision=options.revision)
    raw = read_json(checkpoint.directory / "config.json")
    if raw.get("model_type") is None or raw.get("auto_map"):
        came = "needs code of its own (auto_map)" if raw.get("auto_map") else "names no model_type"
        raise CheckpointError(
            f"{checkpoint.directory / 'config.json'}: {came} | a model_type of transformers | "
            "code of a checkpoint is never executed: use a checkpoint of a supported architecture"
        )
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
    except Exception as err:  # transformers raises what its validators raise
        raise CheckpointError(
            f"{checkpoint.directory / 'config.json'}: {str(err).splitlines()[0]} | a config that transformers reads | "
            "check the checkpoint"
        ) from err
    shape = decoder_shape(config)
    check_limits(config, steps=options.steps, max_tokens=options.max_tokens)
    tokenizer = _open_tokenizer(checkpoint.directory)
    pad = pad_token_id(checkpoint.directory, tokenizer.get_vocab())
    if max(tokenizer.get_vocab_size() - 1, pad) >= shape.vocab_size:
        raise CheckpointError(
            f"{checkpoint.directory / 'tokenizer.json'}: {tokenizer.get_vocab_size()} tokens | at most the "
            f"{shape.vocab_size} of config.json | the tokenizer belongs to another model"
        )
    return _Source(checkpoint, SafetensorsIndex(checkpoint.shards), config, shape, tokenizer, pad)


def _open_tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f'{path}: missing | the fast tokenizer | make it once: python -c "from transformers import AutoTokenizer; '
            f"AutoTokenizer.from_pretrained('{directory}').save_pretrained('{directory}')\""
        )
    return load_tokenizer(path)


def _trace_and_plan(options: ExportOptions, source: _Source, progress: StageProgress) -> list[_Variant]:
    """Trace, compose, and match the weights; reads headers only, so a wrong adapter fails before anything is written."""
    with progress.stage(f"trace the {source.shape.architecture} decoder ({source.shape.num_layers} layers)"):
        decoder = trace_decoder(source.config, source.shape, positions=options.max_tokens + options.steps)
        simplify_decoder(decoder)
    with progress.stage(
        f"compose {options.steps} refinement steps ({options.layout}, {', '.join(options.precisions)})"
    ):
        return [_plan_variant(precision, decoder, options, source) for precision in options.precisions]


def _plan_variant(precision: Precision, decoder: ir.Graph, options: ExportOptions, source: _Source) -> _Variant:
    graphs, rewrites = {}, {}
    for layout in sorted(_graph_facts(options, source.shape).layouts):
        graphs[layout] = compose_graph(decoder, source.shape, options.settings, layout=layout)
        rewrites[layout] = set_precision(graphs[layout], precision, keep_float32=options.keep_float32)
    plan = WeightPlan.build(
        weight_initializers(graphs.values()),
        source.weights,
        source.checkpoint.adapter_directory,
        tied=source.shape.tied,
    )
    return _Variant(precision, graphs, rewrites, plan)


def _check_resources(
    base: SafetensorsIndex, precisions: Sequence[Precision], output: Path, progress: StageProgress
) -> str | None:
    """Compare what the export needs with what is free, and say so, before anything expensive starts.

    Returns:
        Why the golden vectors cannot be computed, or None if they can.

    Raises:
        ExportError: memory or disk do not suffice.
    """
    total, largest = estimate_bytes(base)
    parent = next(path for path in output.parents if path.exists())
    written = sum(total * int(DTYPES[precision].itemsize) // 4 for precision in precisions)
    disk_needed, disk_free = written + SMALL_FILES_BYTES, shutil.disk_usage(parent).free
    memory_needed, memory_free = TRACE_BYTES + 3 * largest, psutil.virtual_memory().available
    reference_needed = TRACE_BYTES + REFERENCE_BYTES + int(1.2 * total)  # PEFT merges layer by layer
    progress.note(
        f"  needs {_gib(disk_needed)} of disk ({_gib(disk_free)} free) and {_gib(memory_needed)} of memory, "
        f"{_gib(reference_needed)} with golden vectors ({_gib(memory_free)} available)"
    )
    if disk_needed > disk_free:
        raise ExportError(
            f"--output {output}: {_gib(disk_free)} free | {_gib(disk_needed)} | free some space or choose another disk"
        )
    if memory_needed > memory_free:
        raise ExportError(f"memory: {_gib(memory_free)} available | {_gib(memory_needed)} | close other programs")
    if reference_needed > memory_free:
        reason = f"the PyTorch reference needs {_gib(reference_needed)} of memory, {_gib(memory_free)} were available"
        progress.note(f"  no golden vectors: {reason}")
        return reason
    return None


def _write_variants(
    directory: Path, variants: Sequence[_Variant], options: ExportOptions, source: _Source, progress: StageProgress
) -> dict[str, FileEntry]:
    """Write weights, graphs and tokenizer; return the entries of the weights, which were hashed while written."""
    files = {}
    identity = _graph_facts(options, source.shape).identity
    for variant in variants:
        folder, plan = directory / variant.precision, variant.plan
        folder.mkdir()
        stage = f"write {_gib(plan.total_bytes)} of {variant.precision} weights"
        with progress.stage(stage, total=plan.total_bytes) as advance:
            entry = write_weights(plan, folder / WEIGHTS_FILE, on_bytes=advance)
        files[f"{variant.precision}/{WEIGHTS_FILE}"] = entry
        external = external_tensors(plan, WEIGHTS_FILE)
        with progress.stage(f"write the {variant.precision} graphs"):
            for layout, model in variant.graphs.items():
                for name, value in model.graph.initializers.items():
                    value.const_value = external.get(name, value.const_value)
                model.metadata_props[io_spec.GRAPH_IDENTITY_KEY] = identity
                ir.save(model, folder / GRAPH_FILES[layout])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = source.checkpoint.directory / name
        if path.is_file():
            shutil.copyfile(path, directory / name)
    return files


def _write_golden(directory: Path, options: ExportOptions, source: _Source, progress: StageProgress) -> None:
    with progress.stage("compute golden vectors with PyTorch"):
        write_golden(
            directory,
            source.checkpoint,
            source.tokenizer,
            options.settings,
            pad_token_id=source.pad_token_id,
            max_tokens=options.max_tokens,
        )


def _write_manifest(
    directory: Path,
    variants: Sequence[_Variant],
    options: ExportOptions,
    source: _Source,
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
        graph=_graph_facts(options, source.shape),
        prompt_template=PROMPT_TEMPLATE,
        pad_token_id=source.pad_token_id,
        variants={variant.precision: _manifest_variant(variant, options) for variant in variants},
        golden=golden_missing_reason is None,
        golden_missing_reason=golden_missing_reason,
        tools={name: importlib.metadata.version(name) for name in TOOLS},
        files=dict(sorted(files.items())),
    )
    (directory / MANIFEST_NAME).write_bytes(manifest.to_json())


def _manifest_variant(variant: _Variant, options: ExportOptions) -> Variant:
    folder = variant.precision
    return Variant(
        graphs={
            layout: GraphFile(
                f"{folder}/{GRAPH_FILES[layout]}", _tensor_specs(model.graph.inputs), _tensor_specs(model.graph.outputs)
            )
            for layout, model in variant.graphs.items()
        },
        weights=f"{folder}/{WEIGHTS_FILE}",
        float32=(*FLOAT32_ISLANDS[folder], *options.keep_float32),
        rewrites=variant.rewrites,
    )


def _graph_facts(options: ExportOptions, shape: DecoderShape) -> GraphFacts:
    return GraphFacts(
        architecture=shape.architecture,
        layout=options.layout,
        steps=options.steps,
        pooling=options.pooling,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        kv_size=shape.kv_size,
        vocab_size=shape.vocab_size,
    )


def _tensor_specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            str(value.name),
            str(ir.DataType(value.dtype or 0).numpy()),
            tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()),
        )
        for value in values
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
