"""Rewrite a FP32 graph to an INT8 variant, by a calibration.

Every product whose input the calibration does not keep in float becomes an integer one; the weights of queries, keys and
values lie side by side in one, and a Split hands the parts on. Smoothing costs nothing at run time: it is folded into
the weight of the RMSNorm before. The channels that stay in float are multiplied beside the integer product.
``int8-weights`` stores int8 with a scale for every block of 32 inputs and computes in float.
"""

import functools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gircse.calibration.calibration_file import Calibration, InputCalibration
from gircse.calibration.int8.scheme import JOINED, LIMBS, VOCABULARY_INPUT, InputKind, QuantizedInput, decoder_inputs
from gircse.calibration.moments_file import MomentsFile
from gircse.export.graph.architecture import DecoderShape
from gircse.export.graph.compose import FloatVocabulary, Vocabulary
from gircse.export.graph.simplify import TRANSPOSED_SUFFIX
from gircse.export.int8.qdq import Attribute, QdqBuilder
from gircse.export.int8.vocabulary import IntegerVocabulary
from gircse.export.int8.weights import (
    BlockwiseProduct,
    IntegerProduct,
    ReadMoments,
    SmoothedNorm,
    WeightSource,
    block_size,
)
from gircse.runtime.errors import ExportError
from gircse.runtime.precision import Precision


@dataclass(frozen=True)
class Quantized:
    """What was done to a graph.

    Attributes:
        counts: inputs of integer products by kind, and the smoothing that was folded.
        recipes: what fills the new initializers.
    """

    counts: Mapping[str, int]
    recipes: tuple[WeightSource, ...]


def int8_vocabulary(
    precision: Precision, calibration: Calibration, shape: DecoderShape, kept: Collection[str]
) -> Vocabulary:
    """Return how a variant's graph reads the vocabulary, which is as in FP32 if its projection is kept."""
    if VOCABULARY_INPUT.name in kept:
        return FloatVocabulary()
    site = calibration.inputs.get(VOCABULARY_INPUT.name)
    return IntegerVocabulary(
        (shape.vocab_size, shape.hidden_size),
        shape.tied,
        calibration.soft_token,
        LIMBS[InputKind.VOCABULARY] if precision is Precision.INT8 else None,
        site.threshold if site else 0.0,
    )


def excluded_inputs(
    precision: Precision, calibration: Calibration, shape: DecoderShape, *, keep_float32: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the inputs whose products stay in float.

    Args:
        precision: the variant.
        calibration: knows the sensitive ones.
        shape: sizes of the decoder.
        keep_float32: parts of weight names; products with such a weight are kept too.

    Raises:
        ExportError: an entry of ``keep_float32`` fits no weight.
    """
    sites = decoder_inputs(shape.num_layers)
    kept = set(calibration.sensitivity.excluded) if precision is Precision.INT8 else set()
    for part in keep_float32:
        found = {site.name for site in sites if any(part in f"{name}.weight" for name in site.projections)}
        if not found:
            raise ExportError(
                f"--keep-float32 {part}: fits no weight | a part of a name such as {sites[0].projections[0]}.weight | check it"
            )
        kept |= found
    return tuple(sorted(kept))


def quantize(
    model: ir.Model,
    precision: Precision,
    calibration: Calibration,
    shape: DecoderShape,
    *,
    moments: MomentsFile,
    vocabulary: Vocabulary,
    kept: Collection[str],
) -> Quantized:
    """Rewrite a FP32 graph in place.

    Args:
        model: a graph of ``compose_graph`` with the variant's vocabulary.
        precision: one of the INT8 precisions.
        calibration: of this model.
        shape: sizes of the decoder.
        moments: of the calibration; the weights are rounded by them.
        vocabulary: what the graph was composed with.
        kept: inputs whose products stay in float.

    Raises:
        ExportError: a product was not found, or the calibration has no entry for it.
    """
    rewriter = _Rewriter(model.graph, precision, calibration, moments, kept)
    for site in decoder_inputs(shape.num_layers):
        if site.kind is not InputKind.VOCABULARY:
            rewriter.rewrite(site)
    RemoveUnusedNodesPass()(model)
    recipes = [*rewriter.recipes, *(vocabulary.recipes if isinstance(vocabulary, IntegerVocabulary) else ())]
    if isinstance(vocabulary, IntegerVocabulary):
        rewriter.counts[InputKind.VOCABULARY] += 1
    if not rewriter.counts:
        raise ExportError(
            f"--precision {precision}: the calibration keeps every input in float | at least one integer product | "
            "calibrate with a larger --max-drop"
        )
    return Quantized(dict(sorted(rewriter.counts.items())), tuple(recipes))


class _Rewriter:
    """Rewrites the products of one graph, site by site."""

    def __init__(
        self,
        graph: ir.Graph,
        precision: Precision,
        calibration: Calibration,
        moments: MomentsFile,
        kept: Collection[str],
    ) -> None:
        self._graph, self._precision, self._calibration, self._kept = graph, precision, calibration, kept
        self._moments = moments
        self._products = _products_by_weight(graph)
        self.counts: Counter[str] = Counter()
        self.recipes: list[WeightSource] = []

    def rewrite(self, site: QuantizedInput) -> None:
        """Turn the products of one input into one integer product, unless it is kept."""
        nodes = [self._product(name) for name in site.projections]
        if site.name in self._kept:
            return
        if self._precision is Precision.INT8_WEIGHTS:
            for node, name in zip(nodes, site.projections, strict=True):
                self._store_blockwise(site, node, name)
        else:
            self._make_integer(site, nodes)
        self.counts[site.kind] += 1

    def _product(self, projection: str) -> ir.Node:
        name = f"{projection}.weight{TRANSPOSED_SUFFIX}"
        if name not in self._products:
            raise ExportError(
                f"--precision {self._precision}: no product with {name} | one in every decoder layer | report this model: "
                "its graph has another form"
            )
        return self._products[name]

    def _store_blockwise(self, site: QuantizedInput, node: ir.Node, projection: str) -> None:
        source = f"{projection}.weight"
        shape = tuple(reversed(_dims(node.inputs[1])))
        recipe = BlockwiseProduct(projection, source, shape, block_size(shape[1]), self._reader(site))
        weight, scale = (self._initializer(recipe, name) for name in (recipe.weight_name, recipe.scale_name))
        nodes = _Inserted(self._graph, node)
        product = QdqBuilder(nodes).blockwise_product(_first(node), weight, scale, block=recipe.block)
        node.outputs[0].replace_all_uses_with(product)
        self.recipes.append(recipe)

    def _make_integer(self, site: QuantizedInput, nodes: Sequence[ir.Node]) -> None:
        calibration = self._site(site)
        smoothing = torch.tensor(calibration.smoothing) if calibration.smoothing else None
        if smoothing is not None:
            self._fold_smoothing(site, nodes[0], smoothing)
        projections = dict(zip(site.projections, nodes, strict=True))
        groups = [projections] if site.kind in JOINED else [{name: node} for name, node in projections.items()]
        recipes = []
        for group in groups:
            sources = {f"{name}.weight": tuple(reversed(_dims(node.inputs[1]))) for name, node in group.items()}
            name = site.name if len(groups) == 1 else next(iter(group))
            recipes.append(IntegerProduct(name, sources, smoothing, calibration.outlier_channels, self._reader(site)))
        inserted = _Inserted(self._graph, nodes[0])
        operators = QdqBuilder(inserted)
        products = operators.products(
            _first(nodes[0]),
            [(self._initializer(r, r.weight_name), self._initializer(r, r.scale_name)) for r in recipes],
            limbs=LIMBS[site.kind],
            threshold=calibration.threshold,
        )
        for recipe, product, group in zip(recipes, products, groups, strict=True):
            if calibration.outlier_channels:
                floats = self._initializer(recipe, recipe.outlier_name)
                beside = operators.outlier_channels(_first(nodes[0]), calibration.outlier_channels, floats)
                product = inserted.op("Add", product, beside)
            self._hand_on(inserted, product, list(group.values()))
        self.recipes += recipes

    def _hand_on(self, inserted: "_Inserted", product: ir.Value, nodes: Sequence[ir.Node]) -> None:
        """Give the parts of a product to the users of the nodes that it replaces."""
        parts: Sequence[ir.Value] = [product]
        if len(nodes) > 1:
            widths = np.array([_dims(node.inputs[1])[1] for node in nodes], np.int64)
            sizes = inserted.constant("widths_" + "_".join(map(str, widths)), widths)
            parts = inserted.op_multi("Split", product, sizes, outputs=len(nodes), axis=-1)
        for node, part in zip(nodes, parts, strict=True):
            node.outputs[0].replace_all_uses_with(part)

    def _fold_smoothing(self, site: QuantizedInput, node: ir.Node, smoothing: torch.Tensor) -> None:
        """Divide the input by its smoothing where it is made: RMSNorm's weight."""
        norm = _first(node).producer()
        if norm is None or norm.op_type != "RMSNormalization" or norm.inputs[1] is None:
            raise ExportError(
                f"--precision {self._precision}: {site.name} does not come from RMSNorm | a decoder that normalizes it | "
                "report this model: its graph has another form"
            )
        name = str(norm.inputs[1].name)
        self.recipes.append(SmoothedNorm(name, smoothing))
        self.counts["fold_smoothing"] += 1

    def _reader(self, site: QuantizedInput) -> ReadMoments:
        return functools.partial(self._moments.read, site.name)

    def _site(self, site: QuantizedInput) -> InputCalibration:
        if site.name not in self._calibration.inputs:
            raise ExportError(
                f"--calibration: no entry for {site.name} | one for every input of the model | calibrate again"
            )
        return self._calibration.inputs[site.name]

    def _initializer(self, recipe: WeightSource, name: str) -> ir.Value:
        dtype = ir.DataType.INT8 if name.endswith(".int8") else ir.DataType.FLOAT
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(recipe.shapes[name]))
        self._graph.initializers.add(value)
        return value


class _Inserted:
    """Adds nodes in front of a node of a finished graph."""

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self._graph, self._before = graph, before

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Attribute) -> ir.Value:
        return self.op_multi(op_type, *inputs, outputs=1, **attributes)[0]

    def op_multi(self, op_type: str, *inputs: ir.Value, outputs: int, **attributes: Attribute) -> Sequence[ir.Value]:
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs)
        self._graph.insert_before(self._before, node)
        return node.outputs

    def constant(self, name: str, value: np.ndarray) -> ir.Value:
        if name not in self._graph.initializers:
            tensor = ir.tensor(value, name=name)
            self._graph.initializers.add(
                ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(value.shape), const_value=tensor)
            )
        return self._graph.initializers[name]


def _products_by_weight(graph: ir.Graph) -> dict[str, ir.Node]:
    return {
        str(node.inputs[1].name): node
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
