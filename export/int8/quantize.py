"""Quantize an FP32 graph, by a calibration.

Every product whose input is not excluded from quantization reads integer weights; those of queries, keys and values lie
side by side in one product, and a Split hands the parts on. Outlier channels are multiplied in float next to it.

``int8`` rounds the inputs too and multiplies integers. Its smoothing costs nothing at run time: it is folded into the
weight of the RMSNorm before. ``fp8`` does the same with E4M3 numbers. ``int8-weights`` and ``int4-weights`` multiply in
float.

A variant has two graphs on the same weights, one for ONNX Runtime and one for TensorRT (:class:`QdqTarget`); that of
``fp8`` is the same for both.
"""

import functools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gircse.calibration.calibration_file import Calibration, InputCalibration
from gircse.calibration.int8.gptq import largest_moments
from gircse.calibration.int8.rounding import INT8_PER_CHANNEL, WeightGrid
from gircse.calibration.int8.scheme import (
    INT4_BLOCKS,
    INT4_KINDS,
    JOINED,
    LIMBS,
    VOCABULARY_INPUT,
    WEIGHT_OUTLIER_CHANNELS,
    InputKind,
    QuantizedInput,
    decoder_inputs,
)
from gircse.calibration.moments_file import MomentsFile
from gircse.export.fp8.e4m3 import E4M3_GRID, E4M3_LIMBS
from gircse.export.fp8.weights import Fp8Product
from gircse.export.graph.architecture import DecoderShape
from gircse.export.graph.builder import NodeBuilder
from gircse.export.graph.compose import FloatVocabulary
from gircse.export.graph.simplify import transpose_of
from gircse.export.int8.dequantized_vocabulary import DequantizedVocabulary
from gircse.export.int8.qdq import LeftOperand, QdqBuilder, QdqTarget
from gircse.export.int8.vocabulary import IntegerVocabulary
from gircse.export.int8.weights import (
    QuantizedProduct,
    ReadMoments,
    SmoothedNorm,
    WeightSource,
)
from gircse.runtime.errors import CalibrationError, ExportError, OptionError
from gircse.runtime.precision import SPECS, Precision

Int8Vocabulary = FloatVocabulary | IntegerVocabulary | DequantizedVocabulary


@dataclass(frozen=True)
class OpenedCalibration:
    """A calibration with its second moments, ready to be used.

    Attributes:
        path: of the calibration file.
        calibration: its content.
        moments: the file of second moments next to it.
    """

    path: Path
    calibration: Calibration
    moments: MomentsFile

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read a calibration and find its moments.

        Raises:
            GircseError: one of the two cannot be used, or they do not belong together.
        """
        calibration = Calibration.read(path)
        return cls(path, calibration, MomentsFile.open(path, calibration.moments_sha256))


@dataclass(frozen=True)
class Quantization:
    """How the graphs of a quantized variant are made.

    Attributes:
        precision: the variant.
        calibration: of this model; its moments round the weights.
        shape: sizes of the decoder.
        excluded: inputs that are not quantized.
    """

    precision: Precision
    calibration: OpenedCalibration
    shape: DecoderShape
    excluded: Collection[str]

    @property
    def quantizes_activations(self) -> bool:
        """Whether the inputs of products have 8 bits too."""
        return SPECS[self.precision].integer_products or self.precision is Precision.FP8

    def vocabulary(self, target: QdqTarget) -> Int8Vocabulary:
        """Return how a graph reads the vocabulary: as in FP32 if its projection is excluded, and in FP8 variants."""
        if target is QdqTarget.FP8 or VOCABULARY_INPUT.name in self.excluded:
            return FloatVocabulary()
        calibration, shape = self.calibration.calibration, self.shape
        found = calibration.inputs.get(VOCABULARY_INPUT.name)
        integers = IntegerVocabulary(
            (shape.vocab_size, shape.hidden_size),
            shape.tied,
            calibration.soft_token,
            LIMBS[InputKind.VOCABULARY] if self.quantizes_activations else None,
            found.threshold if found else 0.0,
        )
        return integers if target is QdqTarget.ONNX_RUNTIME else DequantizedVocabulary(integers)


@dataclass(frozen=True)
class Quantized:
    """What was done to a graph.

    Attributes:
        counts: inputs of quantized products by kind, and the smoothing that was folded.
        weight_sources: what makes the new initializers.
    """

    counts: Mapping[str, int]
    weight_sources: tuple[WeightSource, ...]


def excluded_inputs(
    precision: Precision, calibration: Calibration, shape: DecoderShape, *, keep_float32: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the inputs whose products stay in float.

    Args:
        precision: the variant.
        calibration: knows the sensitive ones.
        shape: sizes of the decoder.
        keep_float32: parts of weight names; products with such a weight are excluded too.

    Raises:
        OptionError: an entry of ``keep_float32`` matches no weight.
    """
    inputs = decoder_inputs(shape.num_layers)
    excluded = set(calibration.sensitivity.excluded) if precision is Precision.INT8 else set()
    for part in keep_float32:
        found = {entry.name for entry in inputs if any(part in f"{name}.weight" for name in entry.projections)}
        if not found:
            raise OptionError(
                f"--keep-float32 {part}",
                "matches no weight",
                f"it takes a part of a name such as {inputs[0].projections[0]}.weight",
            )
        excluded |= found
    return tuple(sorted(excluded))


def quantize(
    model: ir.Model,
    quantization: Quantization,
    vocabulary: Int8Vocabulary,
    *,
    target: QdqTarget = QdqTarget.ONNX_RUNTIME,
) -> Quantized:
    """Rewrite an FP32 graph in place.

    Args:
        model: a graph of ``compose_graph`` with the variant's vocabulary.
        quantization: how.
        vocabulary: what the graph was composed with.
        target: what the graph is for.

    Raises:
        CalibrationError: the calibration has no entry for an input, or excludes them all.
        ExportError: a product was not found, or a scale is too small for TensorRT.
    """
    rewriter = _Rewriter(model.graph, quantization, target)
    for quantized_input in decoder_inputs(quantization.shape.num_layers):
        if quantized_input.kind is not InputKind.VOCABULARY:
            rewriter.rewrite(quantized_input)
    RemoveUnusedNodesPass()(model)
    sources = rewriter.weight_sources
    if not isinstance(vocabulary, FloatVocabulary):
        sources += vocabulary.weight_sources
        rewriter.counts[InputKind.VOCABULARY] += 1
    if not rewriter.counts:
        raise CalibrationError(
            f"--calibration {quantization.calibration.path}",
            "excludes every input from quantization",
            f"--precision {quantization.precision} needs at least one quantized product",
            "Calibrate with a larger --max-drop.",
        )
    return Quantized(dict(sorted(rewriter.counts.items())), tuple(sources))


@dataclass(frozen=True)
class _Rewriter:
    """Rewrites the products of one graph, input by input."""

    graph: ir.Graph
    how: Quantization
    target: QdqTarget
    counts: Counter[str] = field(default_factory=Counter)
    weight_sources: list[WeightSource] = field(default_factory=list)

    @functools.cached_property
    def _products(self) -> dict[str, ir.Node]:
        return _products_by_weight(self.graph)

    def rewrite(self, quantized_input: QuantizedInput) -> None:
        """Quantize the products of one input, unless it is excluded."""
        nodes = [self._product(name) for name in quantized_input.projections]
        if quantized_input.name in self.how.excluded:
            return
        self._quantize(quantized_input, nodes)
        self.counts[quantized_input.kind] += 1

    def _product(self, projection: str) -> ir.Node:
        name = f"{projection}.weight"
        if name not in self._products:
            raise ExportError(
                f"--precision {self.how.precision}",
                f"finds no product with {name}",
                "every decoder layer has one",
                "Report this model: its graph has another form.",
            )
        return self._products[name]

    def _quantize(self, quantized_input: QuantizedInput, nodes: Sequence[ir.Node]) -> None:
        smoothing, channels = self._chosen(quantized_input)
        if smoothing is not None:
            self._fold_smoothing(quantized_input, nodes[0], smoothing)
        projections = dict(zip(quantized_input.projections, nodes, strict=True))
        joined = quantized_input.kind in JOINED
        groups = [projections] if joined else [{name: node} for name, node in projections.items()]
        builder = NodeBuilder.before(self.graph, nodes[0])
        qdq, x = QdqBuilder(builder, self.target), _first(nodes[0])
        left, grid = self._left_operand(qdq, quantized_input, x), self._grid(quantized_input, nodes[0])
        kind = Fp8Product if self.target is QdqTarget.FP8 else QuantizedProduct
        for group in groups:
            reads = {f"{name}.weight": tuple(reversed(_dims(node.inputs[1]))) for name, node in group.items()}
            name = quantized_input.name if len(groups) == 1 else next(iter(group))
            source = kind(name, reads, smoothing, channels, self._reader(quantized_input), grid)
            weight, scales = _initializers(builder, source, source.weight_name, source.scale_name)
            product = qdq.multiply(left, qdq.dequantize_weight(weight, scales, block=grid.block))
            if channels:
                (rows,) = _initializers(builder, source, source.outlier_name)
                product = builder.op("Add", product, qdq.outlier_channels(x, channels, rows))
            _hand_on(builder, product, list(group.values()))
            self.weight_sources.append(source)

    def _limbs(self, quantized_input: QuantizedInput) -> int:
        return E4M3_LIMBS if self.target is QdqTarget.FP8 else LIMBS[quantized_input.kind]

    def _fold_smoothing(self, quantized_input: QuantizedInput, node: ir.Node, smoothing: torch.Tensor) -> None:
        """Divide the input by its smoothing where it is made: RMSNorm's weight."""
        norm = _first(node).producer()
        if norm is None or norm.op_type != "RMSNormalization" or norm.inputs[1] is None:
            raise ExportError(
                f"--precision {self.how.precision}",
                f"needs RMSNorm before {quantized_input.name}",
                "smoothing is folded into its weight",
                "Report this model: its graph has another form.",
            )
        self.weight_sources.append(SmoothedNorm(str(norm.inputs[1].name), smoothing))
        self.counts["fold_smoothing"] += 1

    def _left_operand(self, qdq: QdqBuilder, quantized_input: QuantizedInput, x: ir.Value) -> LeftOperand:
        """Return what the products of an input multiply: 8-bit numbers, or x itself."""
        if not self.how.quantizes_activations:
            return LeftOperand(x)
        return qdq.quantize(
            x,
            limbs=self._limbs(quantized_input),
            threshold=self._calibrated(quantized_input).threshold,
            name=quantized_input.name,
        )

    def _grid(self, quantized_input: QuantizedInput, node: ir.Node) -> WeightGrid:
        """Return what the weights of an input are rounded to; 8 bits where INT4's blocks do not divide it."""
        if self.target is QdqTarget.FP8:
            return E4M3_GRID
        inputs = _dims(node.inputs[1])[0]
        if self.how.precision is Precision.INT4_WEIGHTS and quantized_input.kind in INT4_KINDS:
            return next((WeightGrid(4, block) for block in INT4_BLOCKS if inputs % block == 0), INT8_PER_CHANNEL)
        return INT8_PER_CHANNEL

    def _chosen(self, quantized_input: QuantizedInput) -> tuple[torch.Tensor | None, tuple[int, ...]]:
        """Return the smoothing and the outlier channels of an input.

        Smoothing makes activations easier to round and weights harder: where only weights are rounded there is none,
        and the channels that stay in float are those with the most energy (``largest_moments``).
        """
        if not self.how.quantizes_activations:
            return None, largest_moments(self._reader(quantized_input)(), WEIGHT_OUTLIER_CHANNELS[quantized_input.kind])
        calibration = self._calibrated(quantized_input)
        return torch.tensor(calibration.smoothing) if calibration.smoothing else None, calibration.outlier_channels

    def _reader(self, quantized_input: QuantizedInput) -> ReadMoments:
        return functools.partial(self.how.calibration.moments.read, quantized_input.name)

    def _calibrated(self, quantized_input: QuantizedInput) -> InputCalibration:
        opened = self.how.calibration
        if quantized_input.name not in opened.calibration.inputs:
            raise CalibrationError(
                f"--calibration {opened.path}", f"has no entry for {quantized_input.name}", None, "Calibrate again."
            )
        return opened.calibration.inputs[quantized_input.name]


def _initializers(nodes: NodeBuilder, source: WeightSource, *names: str) -> list[ir.Value]:
    made = source.initializers
    return [nodes.initializer(name, *made[name]) for name in names]


def _hand_on(builder: NodeBuilder, product: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Give the parts of a product to the users of the nodes that it replaces."""
    parts: Sequence[ir.Value] = [product]
    if len(nodes) > 1:
        widths = np.array([_dims(node.inputs[1])[1] for node in nodes], np.int64)
        sizes = builder.constant("widths_" + "_".join(map(str, widths)), widths)
        parts = builder.op_multi("Split", product, sizes, outputs=len(nodes), axis=-1)
    for node, part in zip(nodes, parts, strict=True):
        node.outputs[0].replace_all_uses_with(part)


def _products_by_weight(graph: ir.Graph) -> dict[str, ir.Node]:
    """Return the products by the tensor of the checkpoint that they multiply with."""
    return {
        transpose_of(node.inputs[1]) or str(node.inputs[1].name): node
        for node in graph
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].is_initializer()
    }


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    if value is None:
        raise ValueError(f"{node.name}: a product without an input")
    return value


def _dims(value: ir.Value | None) -> tuple[int, ...]:
    if value is None or value.shape is None:
        raise ValueError("an initializer without a shape")
    return tuple(int(dim) for dim in value.shape.numpy())
