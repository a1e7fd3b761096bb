"""``gircse-export --dry-run``: what an export will take and what it will refuse, from headers and config alone.

Nothing is written, and nothing is read but small files and the headers of safetensors; of a Hugging Face model no more
than that is downloaded. Sizes come from where the export itself takes them. Times are estimates: sizes over the rates
that this machine shows in a second of measuring, and over those below for what cannot be measured without doing it.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F

from gircse.calibration.fingerprint import fingerprint_of
from gircse.checkpoint.available_memory import available_memory
from gircse.checkpoint.hub import HeaderDownload, hub_cache
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.reference_choice import ReferenceBudget
from gircse.checkpoint.streaming_time import shortest_seconds
from gircse.checkpoint.tensor_naming import EMBEDDING_TABLE, LM_HEAD
from gircse.export.exporter import open_calibration
from gircse.export.golden import golden_batch
from gircse.export.model_source import SourceModel, open_source
from gircse.export.options import ExportOptions
from gircse.export.overflow_report import fp16_variants
from gircse.export.proof import check_runtime, session_memory
from gircse.export.resources import TRACE_BYTES, ExportNeeds, check_disk
from gircse.export.staging import check_destination
from gircse.reporting.sizes import duration, gib
from gircse.runtime.errors import GircseError, readable
from gircse.runtime.precision import SPECS
from gircse.runtime.text_files import read_texts

TRACE_SECONDS, TRACE_SECONDS_PER_LAYER = 5.0, 0.4
"""Of torch.export and the rewrites of its graph: half of what an export of the demo, with 30 layers, takes in all."""

DISK_BYTES_PER_SECOND, NETWORK_BYTES_PER_SECOND = 300e6, 50e6
"""Reckoned with, because nobody knows."""

MERGE_COPIES = 4
"""A weight that PEFT merges takes as long as so many that are copied: its factors are multiplied and added to it,
and it is hashed before and after."""


@dataclass(frozen=True)
class Stage:
    """A stage of an export.

    Attributes:
        name: in words.
        memory: bytes that it holds.
        disk: bytes that it writes.
        seconds: estimate of its time; None where there is none.
        remark: what else a user should know.
    """

    name: str
    memory: int = 0
    disk: int = 0
    seconds: float | None = None
    remark: str = ""


@dataclass(frozen=True)
class ExportPlan:
    """What an export will do.

    Attributes:
        model: what the model is, a line each.
        stages: in their order.
        refusals: errors, with the first of which an export would end.
    """

    model: tuple[str, ...]
    stages: tuple[Stage, ...]
    refusals: tuple[GircseError, ...]

    def lines(self) -> Iterator[str]:
        """Yield the plan as text."""
        yield from self.model
        memory, disk = max(stage.memory for stage in self.stages), sum(stage.disk for stage in self.stages)
        total = Stage("in all", memory, disk, sum(stage.seconds or 0 for stage in self.stages))
        rows = [("stage", "memory", "disk", "estimated time", "")]
        for stage in (*self.stages, total):
            memory_text, disk_text = (gib(size) if size else "" for size in (stage.memory, stage.disk))
            seconds = "" if stage.seconds is None else duration(stage.seconds)
            rows.append((stage.name, memory_text, disk_text, seconds, stage.remark))
        width = max(len(row[0]) for row in rows)
        yield from (f"{row[0]:{width}} {row[1]:>10} {row[2]:>10} {row[3]:>15}  {row[4]}".rstrip() for row in rows)
        yield from (f"would be refused: {refusal}" for refusal in self.refusals)
        if not self.refusals:
            yield "nothing would be refused"


@dataclass(frozen=True)
class MachineRates:
    """How fast this machine is at what an export does.

    Attributes:
        copy: seconds to turn a weight from BF16 to FP32 and check it.
        hash: seconds to hash a byte.
        read: seconds to read a byte in a matrix product with a single row.
        flop: seconds for a FLOP in a matrix product with many rows.
    """

    copy: float
    hash: float
    read: float
    flop: float

    @classmethod
    def measure(cls) -> Self:
        """Measure for about a second."""
        stored, weight = torch.ones(2048, 2048, dtype=torch.bfloat16), torch.ones(4096, 4096)
        row, rows = torch.ones(1, 4096), torch.ones(512, 4096)
        content = weight.numpy().data
        return cls(
            copy=shortest_seconds(lambda: torch.aminmax(stored.float())) / stored.numel(),
            hash=shortest_seconds(lambda: hashlib.sha256(content)) / content.nbytes,
            read=shortest_seconds(lambda: F.linear(row, weight)) / content.nbytes,
            flop=shortest_seconds(lambda: F.linear(rows, weight)) / (2 * 512 * weight.numel()),
        )

    def product(self, weights: int, rows: int) -> float:
        """Return the seconds of matrix products of FP32 weights with some rows."""
        return max(4 * weights * self.read, 2 * weights * rows * self.flop)


def plan_export(options: ExportOptions) -> ExportPlan:
    """Find out what an export will take.

    Raises:
        GircseError: the export would end with it, and nothing can be said of what would come after.
    """
    output = options.output.absolute()
    with tempfile.TemporaryDirectory(prefix="gircse-") as scratch:
        download = HeaderDownload(Path(scratch))
        source = open_source(options, download=download)
        missing, needs = download.missing_bytes, ExportNeeds.of(source.weights, options.precisions)
        checks = (
            check_runtime,
            lambda: check_destination(output, force=options.force),
            lambda: _check_calibration(options, source, has_values=not missing),
            lambda: check_disk("the cache of Hugging Face", "the model", hub_cache(), missing),
            lambda: check_disk(f"--output {output}", "the bundle", output, needs.disk),
            needs.check_memory,
        )
        return ExportPlan(
            model=tuple(_description(source, has_values=not missing)),
            stages=tuple(_stages(options, source, needs, missing)),
            refusals=tuple(error for check in checks for error in _refused(check)),
        )


def _refused(check: Callable[[], None]) -> Iterator[GircseError]:
    try:
        check()
    except GircseError as err:
        yield err


def _check_calibration(options: ExportOptions, source: SourceModel, *, has_values: bool) -> None:
    """Refuse what an export refuses; whose calibration it is shows in values, which a download of headers lacks."""
    opened = open_calibration(options)
    if opened is not None and has_values:
        opened.calibration.check(fingerprint_of(source.checkpoint, options), opened.path)


def _description(source: SourceModel, *, has_values: bool) -> Iterator[str]:
    """Yield what the model is, a line each."""
    checkpoint, shape, weights = source.checkpoint, source.shape, source.weights
    adapter = f", adapter {checkpoint.adapter.name} ({gib(weights.adapter_bytes)})" if checkpoint.adapter else ""
    yield f"{checkpoint.model.name}{adapter}"
    vocabulary = "tied to" if shape.tied else "beside"
    yield (
        f"  {shape.architecture}: {shape.num_layers} layers, hidden size {shape.hidden_size}, keys and values "
        f"{shape.kv_size}, vocabulary {shape.vocab_size}, lm_head {vocabulary} the embedding table"
    )
    stored = sum(path.stat().st_size for path in checkpoint.shards)
    yield f"  {weights.total_bytes / 4e9:.2f} billion weights, {gib(stored)} in {len(checkpoint.shards)} files"
    yield from (f"  {readable(note)}" for note in source.notes)
    if not has_values and {EMBEDDING_TABLE, LM_HEAD} <= weights.names.stored.keys() and shape.tied:
        yield "  lm_head is stored beside the embedding table; only their values tell whether they are tied"


def _stages(options: ExportOptions, source: SourceModel, needs: ExportNeeds, missing_bytes: int) -> Iterator[Stage]:
    """Yield the stages of an export in their order."""
    weights, rates = source.weights, MachineRates.measure()
    if missing_bytes:
        at = f"at {NETWORK_BYTES_PER_SECOND / 1e6:.0f} MB/s"
        yield Stage("download", 0, missing_bytes, missing_bytes / NETWORK_BYTES_PER_SECOND, at)
    trace = TRACE_SECONDS + TRACE_SECONDS_PER_LAYER * source.shape.num_layers
    yield Stage("trace and compose", TRACE_BYTES, 0, trace)
    for precision, size in needs.weights.items():
        seconds = _read_seconds(weights, rates) + size * (rates.hash + 1 / DISK_BYTES_PER_SECOND)
        remark = f"with a disk of {DISK_BYTES_PER_SECOND / 1e6:.0f} MB/s"
        if SPECS[precision].calibrated:
            remark += "; the rounding, which takes longer, is not counted"
        yield Stage(f"write {precision}", needs.memory, size, seconds, remark)
    yield _reference_stage(options, source, rates)
    free, embeddings = available_memory(), source.shape.vocab_size * source.shape.hidden_size
    for precision, size in needs.weights.items():
        if SPECS[precision].cpu:
            _, session = session_memory(precision, weights=size, embeddings=embeddings, free=free)
            skipped = f"left out: {gib(free)} available" if session > free else ""
            yield Stage(f"check {precision}", 0 if skipped else session, 0, None, skipped or "no estimate of time")


def _reference_stage(options: ExportOptions, source: SourceModel, rates: MachineRates) -> Stage:
    """Return the stage in which PyTorch computes the golden vectors and probes for overflow."""
    weights, steps = source.weights, options.steps
    budget = ReferenceBudget.of(weights, source.config, options.reference)
    probed = bool(fp16_variants(options.precisions))
    name = f"PyTorch's vectors{' and overflow probe' if probed else ''}"
    if (shortage := budget.shortage) is not None:
        return Stage(name, remark=f"left out: PyTorch {shortage}")
    golden = golden_batch(source.prompts)
    texts, tokens = golden.input_ids.shape[0], golden.input_ids.size
    if probed and options.probe_texts is not None:
        token_ids, _ = source.prompts.tokenize(read_texts(options.probe_texts))
        texts, tokens = texts + len(token_ids), tokens + sum(map(len, token_ids))
    layers = sum(prod(entry.shape) for name, entry in weights.base.entries.items() if name.startswith("model.layers."))
    vocabulary = source.shape.vocab_size * source.shape.hidden_size
    compute = rates.product(layers, tokens)
    compute += steps * (rates.product(layers, texts) + 2 * rates.product(vocabulary, texts))
    if budget.fits_whole:
        return Stage(name, budget.whole, 0, _read_seconds(weights, rates) + compute, "the whole model in memory")
    sweeps = (steps + 1) * _read_seconds(weights, rates, prefix="model.layers.") + 2 * steps * vocabulary * rates.copy
    read = (steps + 1) * sum(path.stat().st_size for path in source.checkpoint.shards)
    remark = f"layer by layer: {steps + 1} sweeps, about {gib(read)} read"
    return Stage(name, budget.streamed, 0, sweeps + compute, remark)


def _read_seconds(weights: ModelWeights, rates: MachineRates, *, prefix: str = "") -> float:
    """Return the time to read the weights of some modules, with the adapter merged."""
    copies = 0
    for name, entry in weights.base.entries.items():
        if name.startswith(prefix):
            merged = weights.adapter is not None and weights.adapter.merges(name)
            copies += prod(entry.shape) * (MERGE_COPIES if merged else 1)
    return copies * rates.copy
