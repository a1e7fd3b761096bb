"""One precision of a bundle: its graphs in both layouts, its weights, its entry in the manifest."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir

from gircse.checkpoint.model_weights import ModelWeights
from gircse.export.graph.architecture import DecoderShape
from gircse.export.graph.builder import RefinementSettings
from gircse.export.graph.compose import compose_graph, weight_initializers
from gircse.export.graph.mixed_precision import set_precision
from gircse.export.graph.narrow_cache import narrow_cache
from gircse.export.graph.size_nodes import size_nodes
from gircse.export.int8.qdq import QdqTarget
from gircse.export.int8.quantize import OpenedCalibration, Quantization, Quantized, excluded_inputs, quantize
from gircse.export.weights.external_data import engine_tensors, external_tensors, write_weights
from gircse.export.weights.layout import WeightLayout
from gircse.runtime import tensor_names
from gircse.runtime.errors import ExportError
from gircse.runtime.manifest import FileEntry, GraphFacts, GraphFile, Layout, TensorSpec, Variant
from gircse.runtime.precision import SPECS, Precision

GRAPH_FILES = {Layout.UNROLLED: "model.onnx", Layout.STEPWISE: "stepwise.onnx"}
ENGINE_GRAPH_FILE = "engine.onnx"


@dataclass(frozen=True)
class DecoderGraph:
    """What every variant is made of.

    Attributes:
        graph: the simplified graph of ``trace_decoder``.
        shape: its sizes.
        settings: what is computed besides the decoder.
        facts: what the graphs compute, for the manifest and the graphs' own metadata.
        weights: weights of the model.
    """

    graph: ir.Graph
    shape: DecoderShape
    settings: RefinementSettings
    facts: GraphFacts
    weights: ModelWeights


@dataclass(frozen=True)
class VariantDraft:
    """A variant whose graphs and weights fit each other; nothing is written yet.

    Attributes:
        precision: its name.
        graphs: its graphs by layout.
        rewrites: how often each rewrite to the precision applied, by layout.
        weights: its weights.
        float32: what stays in FP32, in words.
        engine_graph: what TensorRT engines are built from, where it is a graph of its own.
        engine_missing_reason: why there is none, where there should be.
    """

    precision: Precision
    graphs: Mapping[Layout, ir.Model]
    rewrites: Mapping[Layout, Mapping[str, int]]
    weights: WeightLayout
    float32: tuple[str, ...]
    engine_graph: ir.Model | None = None
    engine_missing_reason: str | None = None


def draft_variant(
    precision: Precision,
    decoder: DecoderGraph,
    *,
    keep_float32: tuple[str, ...],
    calibration: OpenedCalibration | None,
    max_shard_bytes: int | None = None,
) -> VariantDraft:
    """Compose the graphs of a precision and match their weights with the checkpoint.

    Args:
        precision: the variant.
        decoder: what it is made of.
        keep_float32: parts of weight names whose matrix products stay in FP32.
        calibration: for an INT8 variant.
        max_shard_bytes: no file of weights may be larger; None for one file.

    Raises:
        CheckpointError: a tensor of checkpoint or adapter does not fit.
        ExportError: the graph cannot be set to the precision.
        OptionError: a weight is larger than a file may be.
    """
    if SPECS[precision].calibrated:
        if calibration is None:
            raise ValueError(f"{precision} without a calibration")
        excluded = excluded_inputs(precision, calibration.calibration, decoder.shape, keep_float32=keep_float32)
        quantization = Quantization(precision, calibration, decoder.shape, excluded)
        if precision is Precision.FP8:
            return _draft_fp8(decoder, quantization, keep_float32, max_shard_bytes)
        return _draft_int8(decoder, quantization, max_shard_bytes)
    graphs, rewrites = {}, {}
    for layout in sorted(decoder.facts.layouts):
        graphs[layout] = compose_graph(decoder.graph, decoder.shape, decoder.settings, layout=layout)
        rewrites[layout] = set_precision(graphs[layout], precision, keep_float32=keep_float32)
    initializers = weight_initializers(graphs.values())
    weights = WeightLayout.match(initializers, decoder.weights, max_file_bytes=max_shard_bytes)
    return VariantDraft(precision, graphs, rewrites, weights, (*SPECS[precision].float32, *keep_float32))


def _draft_int8(decoder: DecoderGraph, quantization: Quantization, max_shard_bytes: int | None) -> VariantDraft:
    """Compose the one layout of an INT8 variant; K + 1 copies of the decoder would hold K + 1 copies of its weights."""
    precision, layout = quantization.precision, _calibrated_layout(decoder)
    model, quantized = _compose_quantized(decoder, quantization, layout, QdqTarget.ONNX_RUNTIME)
    counts = dict(quantized.counts)
    if SPECS[precision].integer_products:
        counts["narrow_cache"] = narrow_cache(model.graph)
    weights = WeightLayout.match(
        weight_initializers([model]),
        decoder.weights,
        sources=quantized.weight_sources,
        max_file_bytes=max_shard_bytes,
    )
    float32 = (*SPECS[precision].float32, *quantization.excluded)
    draft = VariantDraft(precision, {layout: model}, {layout: counts}, weights, float32)
    if not SPECS[precision].tensorrt:
        return draft
    try:
        engine, _ = _compose_quantized(decoder, quantization, layout, QdqTarget.TENSORRT)
    except ExportError as err:  # FP16 cannot hold a scale, which ONNX Runtime, in FP32, does not mind
        return replace(draft, engine_missing_reason=str(err))
    set_precision(engine, Precision.FP16)
    scales = [node.inputs[1] for node in engine.graph if node.op_type == "DequantizeLinear"]
    copied = weights.with_fp16_copies(
        weight_initializers([engine]), scales={scale for scale in scales if scale is not None}
    )
    return replace(draft, weights=copied, engine_graph=engine)


def _draft_fp8(
    decoder: DecoderGraph, quantization: Quantization, keep_float32: tuple[str, ...], max_shard_bytes: int | None
) -> VariantDraft:
    """Compose the one graph of an FP8 variant: FP16, but for the products of E4M3 numbers."""
    layout = _calibrated_layout(decoder)
    model, quantized = _compose_quantized(decoder, quantization, layout, QdqTarget.FP8)
    counts = set_precision(model, quantization.precision, keep_float32=keep_float32)
    weights = WeightLayout.match(
        weight_initializers([model]),
        decoder.weights,
        sources=quantized.weight_sources,
        max_file_bytes=max_shard_bytes,
    )
    rewrites = {layout: dict(sorted({**counts, **quantized.counts}.items()))}
    float32 = (*SPECS[quantization.precision].float32, *keep_float32)
    return VariantDraft(quantization.precision, {layout: model}, rewrites, weights, float32)


def _calibrated_layout(decoder: DecoderGraph) -> Layout:
    return Layout.STEPWISE if decoder.settings.steps else decoder.facts.layout


def _compose_quantized(
    decoder: DecoderGraph, quantization: Quantization, layout: Layout, target: QdqTarget
) -> tuple[ir.Model, Quantized]:
    vocabulary = quantization.vocabulary(target)
    model = compose_graph(decoder.graph, decoder.shape, decoder.settings, layout=layout, vocabulary=vocabulary)
    return model, quantize(model, quantization, vocabulary, target=target)


class WrittenVariant(NamedTuple):
    """What the manifest says of a variant, and of the files of its weights.

    Attributes:
        entries: of the weights, which were hashed while they were written, by path in the bundle.
        variant: the variant.
        engine_missing_reason: why it has no graph for TensorRT, where it should have one.
    """

    entries: Mapping[str, FileEntry]
    variant: Variant
    engine_missing_reason: str | None


def write_variant(
    draft: VariantDraft, directory: Path, *, identity: str, on_bytes: Callable[[int], None]
) -> WrittenVariant:
    """Write the weights and graphs of a variant into a bundle.

    Args:
        draft: what to write.
        directory: the bundle.
        identity: written into every graph, see ``GraphFacts.identity``.
        on_bytes: told the bytes of weights just written.
    """
    folder = directory / draft.precision
    folder.mkdir()
    written = write_weights(draft.weights, folder, on_bytes=on_bytes)
    external = external_tensors(draft.weights)
    for layout, model in draft.graphs.items():
        _write_graph(model, external, folder / GRAPH_FILES[layout], identity)
    engine = draft.engine_graph if written.copies_missing_reason is None else None
    if engine is not None:
        _write_graph(engine, engine_tensors(draft.weights), folder / ENGINE_GRAPH_FILE, identity)
    entries = {f"{draft.precision}/{name}": entry for name, entry in written.entries.items()}
    reason = draft.engine_missing_reason or written.copies_missing_reason
    return WrittenVariant(entries, _manifest_variant(draft, engine, list(entries)), reason)


def _write_graph(model: ir.Model, external: Mapping[str, ir.ExternalTensor], path: Path, identity: str) -> None:
    for name, value in model.graph.initializers.items():
        value.const_value = external.get(name, value.const_value)
    model.metadata_props[tensor_names.GRAPH_IDENTITY_KEY] = identity
    model.metadata_props[tensor_names.SIZE_NODES_KEY] = ",".join(size_nodes(model.graph))
    ir.save(model, path)


def _manifest_variant(draft: VariantDraft, engine: ir.Model | None, weight_files: Sequence[str]) -> Variant:
    return Variant(
        graphs={
            layout: _graph_file(draft.precision, GRAPH_FILES[layout], model) for layout, model in draft.graphs.items()
        },
        weights=weight_files[0],
        more_weights=tuple(weight_files[1:]),
        float32=draft.float32,
        rewrites=draft.rewrites,
        tensorrt=_graph_file(draft.precision, ENGINE_GRAPH_FILE, engine) if engine is not None else None,
    )


def _graph_file(precision: Precision, name: str, model: ir.Model) -> GraphFile:
    return GraphFile(f"{precision}/{name}", _tensor_specs(model.graph.inputs), _tensor_specs(model.graph.outputs))


def _tensor_specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            str(value.name),
            str(ir.DataType(value.dtype or 0).numpy()),
            tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()),
        )
        for value in values
    )
