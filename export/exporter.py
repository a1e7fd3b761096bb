"""The export from end to end, as a list of stages. ``export_bundle`` is what ``gircse-export`` calls."""

import importlib.metadata
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import psutil
from tokenizers import Tokenizer

from gircse.calibration.checkpoint import Checkpoint, pad_token_id, read_json, resolve_checkpoint
from gircse.calibration.progress import StageProgress
from gircse.export.architecture import DecoderShape, check_limits, decoder_shape
from gircse.export.compose import RefinementSettings, compose_graphs, weight_initializers
from gircse.export.golden import write_golden
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
    TensorSpec,
    Variant,
    file_sha256,
)
from gircse.runtime.errors import CheckpointError, ExportError
from gircse.runtime.token_batch import PROMPT_TEMPLATE, load_tokenizer

PRECISION = "fp32"
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
        layout: ``unrolled`` or ``stepwise``.
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
    force: bool = False

    def __post_init__(self) -> None:
        """Take plain strings for the enums; a ``ValueError`` names what they may be."""
        object.__setattr__(self, "pooling", Pooling(self.pooling))
        object.__setattr__(self, "layout", Layout(self.layout))

    @property
    def settings(self) -> RefinementSettings:
        """The part that the graphs compute."""
        return RefinementSettings(self.steps, self.pooling, self.temperature)


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
    golden_missing_reason = _check_resources(source.weights, output, progress)
    graphs, plan = _trace_and_plan(options, source, progress)
    try:
        with staged_directory(output, force=options.force) as directory:
            files = _write_graphs(directory, graphs, plan, options, source, progress)
            if golden_missing_reason is None:
                _write_golden(directory, options, source, progress)
            with progress.stage("hash the files"):
                _write_manifest(directory, graphs, options, source, files, golden_missing_reason)
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


def _trace_and_plan(
    options: ExportOptions, source: _Source, progress: StageProgress
) -> tuple[dict[str, ir.Model], WeightPlan]:
    """Trace, compose, and match the weights; reads headers only, so a wrong adapter fails before anything is written."""
    with progress.stage(f"trace the {source.shape.architecture} decoder ({source.shape.num_layers} layers)"):
        decoder = trace_decoder(source.config, source.shape, positions=options.max_tokens + options.steps)
        simplify_decoder(decoder)
    with progress.stage(f"compose {options.steps} refinement steps ({options.layout})"):
        graphs = compose_graphs(decoder, source.shape, options.settings, layout=options.layout)
        plan = WeightPlan.build(
            weight_initializers(graphs.values()),
            source.weights,
            source.checkpoint.adapter_directory,
            tied=source.shape.tied,
        )
    return graphs, plan


def _check_resources(base: SafetensorsIndex, output: Path, progress: StageProgress) -> str | None:
    """Compare what the export needs with what is free, and say so, before anything expensive starts.

    Returns:
        Why the golden vectors cannot be computed, or None if they can.

    Raises:
        ExportError: memory or disk do not suffice.
    """
    total, largest = estimate_bytes(base)
    parent = next(path for path in output.parents if path.exists())
    disk_needed, disk_free = total + SMALL_FILES_BYTES, shutil.disk_usage(parent).free
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


def _write_graphs(
    directory: Path,
    graphs: Mapping[str, ir.Model],
    plan: WeightPlan,
    options: ExportOptions,
    source: _Source,
    progress: StageProgress,
) -> dict[str, FileEntry]:
    """Write weights, graphs and tokenizer; return the entry of the weights, which was hashed while it was written."""
    folder = directory / PRECISION
    folder.mkdir()
    with progress.stage(f"write {_gib(plan.total_bytes)} of weights", total=plan.total_bytes) as advance:
        entry = write_weights(plan, folder / WEIGHTS_FILE, on_bytes=advance)
    external = external_tensors(plan, WEIGHTS_FILE)
    facts = _graph_facts(options, source.shape)
    with progress.stage("write the graphs"):
        for role, model in graphs.items():
            for name, value in model.graph.initializers.items():
                value.const_value = external.get(name, value.const_value)
            model.metadata_props[io_spec.GRAPH_IDENTITY_KEY] = facts.identity
            ir.save(model, folder / f"{role}.onnx")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = source.checkpoint.directory / name
            if path.is_file():
                shutil.copyfile(path, directory / name)
    return {f"{PRECISION}/{WEIGHTS_FILE}": entry}


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
    graphs: Mapping[str, ir.Model],
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
        variants={
            PRECISION: Variant(
                {role: _graph_file(f"{PRECISION}/{role}.onnx", model.graph) for role, model in graphs.items()},
                f"{PRECISION}/{WEIGHTS_FILE}",
            )
        },
        golden=golden_missing_reason is None,
        golden_missing_reason=golden_missing_reason,
        tools={name: importlib.metadata.version(name) for name in TOOLS},
        files=dict(sorted(files.items())),
    )
    (directory / MANIFEST_NAME).write_bytes(manifest.to_json())


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


def _graph_file(path: str, graph: ir.Graph) -> GraphFile:
    return GraphFile(path, _tensor_specs(graph.inputs), _tensor_specs(graph.outputs))


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
