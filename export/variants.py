"""One precision of a bundle: its graphs in both layouts, its weights, its entry in the manifest."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from gircse.checkpoint.safetensors_index import SafetensorsIndex
from gircse.export.graph.architecture import DecoderShape
from gircse.export.graph.builder import RefinementSettings
from gircse.export.graph.compose import LM_HEAD, compose_graph, weight_initializers
from gircse.export.graph.mixed_precision import set_precision
from gircse.export.int8.qdq import QdqTarget
from gircse.export.int8.quantize import OpenedCalibration, Quantization, Quantized, excluded_inputs, quantize
from gircse.export.weights.external_data import engine_tensors, external_tensors, write_weights
from gircse.export.weights.layout import WeightLayout
from gircse.runtime import tensor_names
from gircse.runtime.manifest import FileEntry, GraphFacts, GraphFile, Layout, TensorSpec, Variant
from gircse.runtime.precision import SPECS, Precision

GRAPH_FILES = {Layout.UNROLLED: "model.onnx", Layout.STEPWISE: "stepwise.onnx"}
ENGINE_GRAPH_FILE = "engine.onnx"
WEIGHTS_FILE = "weights.bin"


@dataclass(frozen=True)
class DecoderGraph:
    """What every variant is made of.

    Attributes:
        graph: the simplified graph of ``trace_decoder``.
        shape: its sizes.
        settings: what is computed besides the decoder.
        facts: what the graphs compute, for the manifest and the graphs' own metadata.
        base: tensors of the checkpoint.
        adapter_directory: folder of the LoRA, or None.
    """

    graph: ir.Graph
    shape: DecoderShape
    settings: RefinementSettings
    facts: GraphFacts
    base: SafetensorsIndex
    adapter_directory: Path | None

    @property
    def unneeded(self) -> set[str]:
        """Tensors that the graphs do not read: the second copy of a tied lm_head, and any lm_head without steps."""
        return {LM_HEAD} if self.shape.tied or not self.settings.steps else set()


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
    """

    precision: Precision
    graphs: Mapping[Layout, ir.Model]
    rewrites: Mapping[Layout, Mapping[str, int]]
    weights: WeightLayout
    float32: tuple[str, ...]
    engine_graph: ir.Model | None = None

    @property
    def weights_path(self) -> str:
        """Path of its weights in the bundle."""
        return f"{self.precision}/{WEIGHTS_FILE}"


def draft_variant(
    precision: Precision,
    decoder: DecoderGraph,
    *,
    keep_float32: tuple[str, ...],
    calibration: OpenedCalibration | None,
) -> VariantDraft:
    """Compose the graphs of a precision and match their weights with the checkpoint.

    Args:
        precision: the variant.
        decoder: what it is made of.
        keep_float32: parts of weight names whose matrix products stay in FP32.
        calibration: for an INT8 variant.

    Raises:
        CheckpointError: a tensor of checkpoint or adapter does not fit.
        ExportError: the graph cannot be set to the precision.
    """
    if SPECS[precision].calibrated:
        if calibration is None:
            raise ValueError(f"{precision} without a calibration")
        excluded = excluded_inputs(precision, calibration.calibration, decoder.shape, keep_float32=keep_float32)
        return _draft_int8(decoder, Quantization(precision, calibration, decoder.shape, excluded))
    graphs, rewrites = {}, {}
    for layout in sorted(decoder.facts.layouts):
        graphs[layout] = compose_graph(decoder.graph, decoder.shape, decoder.settings, layout=layout)
        rewrites[layout] = set_precision(graphs[layout], precision, keep_float32=keep_float32)
    weights = WeightLayout.match(
        weight_initializers(graphs.values()), decoder.base, decoder.adapter_directory, unneeded=decoder.unneeded
    )
    return VariantDraft(precision, graphs, rewrites, weights, (*SPECS[precision].float32, *keep_float32))


def _draft_int8(decoder: DecoderGraph, quantization: Quantization) -> VariantDraft:
    """Compose the one layout of an INT8 variant; K + 1 copies of the decoder would hold K + 1 copies of its weights."""
    precision = quantization.precision
    layout = Layout.STEPWISE if decoder.settings.steps else decoder.facts.layout
    model, quantized = _compose_int8(decoder, quantization, layout, QdqTarget.ONNX_RUNTIME)
    weights = WeightLayout.match(
        weight_initializers([model]),
        decoder.base,
        decoder.adapter_directory,
        unneeded=decoder.unneeded,
        sources=quantized.weight_sources,
    )
    engine = None
    if SPECS[precision].tensorrt:
        engine, _ = _compose_int8(decoder, quantization, layout, QdqTarget.TENSORRT)
        set_precision(engine, Precision.FP16)
        scales = [node.inputs[1] for node in engine.graph if node.op_type == "DequantizeLinear"]
        weights = weights.with_fp16_copies(
            weight_initializers([engine]), scales={scale for scale in scales if scale is not None}
        )
    float32 = (*SPECS[precision].float32, *quantization.excluded)
    return VariantDraft(precision, {layout: model}, {layout: quantized.counts}, weights, float32, engine)


def _compose_int8(
    decoder: DecoderGraph, quantization: Quantization, layout: Layout, target: QdqTarget
) -> tuple[ir.Model, Quantized]:
    vocabulary = quantization.vocabulary(target)
    model = compose_graph(decoder.graph, decoder.shape, decoder.settings, layout=layout, vocabulary=vocabulary)
    return model, quantize(model, quantization, vocabulary, target=target)


def write_variant(
    variant: VariantDraft, directory: Path, *, identity: str, on_bytes: Callable[[int], None]
) -> FileEntry:
    """Write the weights and graphs of a variant into a bundle.

    Args:
        variant: what to write.
        directory: the bundle.
        identity: written into every graph, see ``GraphFacts.identity``.
        on_bytes: told the bytes of weights just written.

    Returns:
        The entry of the weights, which were hashed while they were written.
    """
    folder = directory / variant.precision
    folder.mkdir()
    entry = write_weights(variant.weights, folder / WEIGHTS_FILE, on_bytes=on_bytes)
    external = external_tensors(variant.weights, WEIGHTS_FILE)
    for layout, model in variant.graphs.items():
        _write_graph(model, external, folder / GRAPH_FILES[layout], identity)
    if variant.engine_graph is not None:
        external = engine_tensors(variant.weights, WEIGHTS_FILE)
        _write_graph(variant.engine_graph, external, folder / ENGINE_GRAPH_FILE, identity)
    return entry


def _write_graph(model: ir.Model, external: Mapping[str, ir.ExternalTensor], path: Path, identity: str) -> None:
    for name, value in model.graph.initializers.items():
        value.const_value = external.get(name, value.const_value)
    model.metadata_props[tensor_names.GRAPH_IDENTITY_KEY] = identity
    ir.save(model, path)


def manifest_variant(variant: VariantDraft) -> Variant:
    """Return the entry of a variant in the manifest."""
    engine = variant.engine_graph
    return Variant(
        graphs={
            layout: _graph_file(variant.precision, GRAPH_FILES[layout], model)
            for layout, model in variant.graphs.items()
        },
        weights=variant.weights_path,
        float32=variant.float32,
        rewrites=variant.rewrites,
        tensorrt=_graph_file(variant.precision, ENGINE_GRAPH_FILE, engine) if engine is not None else None,
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
