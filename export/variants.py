"""One precision of a bundle: its graphs in both layouts, its weights, its entry in the manifest."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from gircse.calibration.calibration_file import Calibration
from gircse.calibration.moments_file import MomentsFile
from gircse.checkpoint.safetensors_index import SafetensorsIndex
from gircse.export.graph.architecture import DecoderShape
from gircse.export.graph.compose import compose_graph, weight_initializers
from gircse.export.graph.mixed_precision import set_precision
from gircse.export.int8.quantize import excluded_inputs, int8_vocabulary, quantize
from gircse.export.options import ExportOptions
from gircse.export.weights.external_data import WeightLayout, external_tensors, write_weights
from gircse.runtime import tensor_names
from gircse.runtime.manifest import FileEntry, GraphFacts, GraphFile, Layout, TensorSpec, Variant
from gircse.runtime.precision import SPECS, Precision

GRAPH_FILES = {Layout.UNROLLED: "model.onnx", Layout.STEPWISE: "stepwise.onnx"}
WEIGHTS_FILE = "weights.bin"


@dataclass(frozen=True)
class VariantDraft:
    """A variant whose graphs and weights fit each other; nothing is written yet.

    Attributes:
        precision: its name.
        graphs: its graphs by layout.
        rewrites: how often each rewrite to the precision applied, by layout.
        plan: its weights.
        float32: what stays in FP32, in words.
    """

    precision: Precision
    graphs: Mapping[Layout, ir.Model]
    rewrites: Mapping[Layout, Mapping[str, int]]
    plan: WeightLayout
    float32: tuple[str, ...]

    @property
    def weights_path(self) -> str:
        """Path of its weights in the bundle."""
        return f"{self.precision}/{WEIGHTS_FILE}"


def graph_facts(options: ExportOptions, shape: DecoderShape) -> GraphFacts:
    """Return what the graphs compute, for the manifest and the graphs' own metadata."""
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


def draft_variant(
    precision: Precision,
    decoder: ir.Graph,
    options: ExportOptions,
    *,
    shape: DecoderShape,
    base: SafetensorsIndex,
    adapter_directory: Path | None,
    calibration: tuple[Calibration, MomentsFile] | None,
) -> VariantDraft:
    """Compose the graphs of a precision and match their weights with the checkpoint.

    Args:
        precision: the variant.
        decoder: the simplified graph of ``trace_decoder``.
        options: what the export was asked for.
        shape: sizes of the decoder.
        base: tensors of the checkpoint.
        adapter_directory: folder of the LoRA, or None.
        calibration: for an INT8 variant, with its second moments.

    Raises:
        CheckpointError: a tensor of checkpoint or adapter does not fit.
        ExportError: the graph cannot be set to the precision.
    """
    if SPECS[precision].calibrated:
        if calibration is None:
            raise ValueError(f"{precision} without a calibration")
        return _draft_int8(precision, decoder, options, *calibration, shape=shape, base=base, adapter=adapter_directory)
    graphs, rewrites = {}, {}
    for layout in sorted(graph_facts(options, shape).layouts):
        graphs[layout] = compose_graph(decoder, shape, options.settings, layout=layout)
        rewrites[layout] = set_precision(graphs[layout], precision, keep_float32=options.keep_float32)
    plan = WeightLayout.build(weight_initializers(graphs.values()), base, adapter_directory, tied=shape.tied)
    return VariantDraft(precision, graphs, rewrites, plan, (*SPECS[precision].float32, *options.keep_float32))


def _draft_int8(
    precision: Precision,
    decoder: ir.Graph,
    options: ExportOptions,
    calibration: Calibration,
    moments: MomentsFile,
    *,
    shape: DecoderShape,
    base: SafetensorsIndex,
    adapter: Path | None,
) -> VariantDraft:
    """Compose the one graph of an INT8 variant; K + 1 copies of the decoder would be K + 1 copies of packed weights."""
    layout = Layout.STEPWISE if options.steps else options.layout
    kept = excluded_inputs(precision, calibration, shape, keep_float32=options.keep_float32)
    vocabulary = int8_vocabulary(precision, calibration, shape, kept)
    model = compose_graph(decoder, shape, options.settings, layout=layout, vocabulary=vocabulary)
    quantized = quantize(model, precision, calibration, shape, moments=moments, vocabulary=vocabulary, kept=kept)
    plan = WeightLayout.build(weight_initializers([model]), base, adapter, tied=shape.tied, recipes=quantized.recipes)
    return VariantDraft(
        precision, {layout: model}, {layout: quantized.counts}, plan, (*SPECS[precision].float32, *kept)
    )


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
    entry = write_weights(variant.plan, folder / WEIGHTS_FILE, on_bytes=on_bytes)
    external = external_tensors(variant.plan, WEIGHTS_FILE)
    for layout, model in variant.graphs.items():
        for name, value in model.graph.initializers.items():
            value.const_value = external.get(name, value.const_value)
        model.metadata_props[tensor_names.GRAPH_IDENTITY_KEY] = identity
        ir.save(model, folder / GRAPH_FILES[layout])
    return entry


def manifest_variant(variant: VariantDraft) -> Variant:
    """Return the entry of a variant in the manifest."""
    return Variant(
        graphs={
            layout: GraphFile(
                f"{variant.precision}/{GRAPH_FILES[layout]}",
                _tensor_specs(model.graph.inputs),
                _tensor_specs(model.graph.outputs),
            )
            for layout, model in variant.graphs.items()
        },
        weights=variant.weights_path,
        float32=variant.float32,
        rewrites=variant.rewrites,
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
