"""Set the precision of a composed graph: FP16 or BF16 matrix products, FP32 around them.

Every node that computes with floats is put into one of two classes by rule, with a Cast wherever a value crosses from
one to the other::

    low    MatMul, Gemm, Attention, RotaryEmbedding; a row of a low table (Gather); a bias added to a low value, and
           the sum of two products (that of outlier channels); what makes the KV cache; Concat, Reshape and the like
           where every computed input is low; in FP16 also SwiGLU's Sigmoid and Mul; DequantizeLinear of a quantized
           product's operands
    FP32   everything else: the residual stream (every other Add), RMSNormalization, the softmax over the vocabulary,
           the mean and the norm of the pooling, the attention bias; in BF16 also SwiGLU's products, whose three
           roundings cost more than any other rule: smallest cosine of the demo 0.99950 with them, 0.99979 without.
           Gemma's GeGLU, whose tanh takes the cube of a value; its scaled embeddings and capped logits

Attention's own softmax has no type of its own here: TensorRT takes no ``softmax_precision``, ONNX Runtime's CUDA
provider no fused kernel with it, and the fused kernels of both keep that softmax in FP32. The soft token
softmax(...) @ E reads the low table (an FP32 copy of the largest weight would cost more than it could gain); for FP16
the probabilities are multiplied by ``MIXTURE_SCALE`` and the sum is divided by it in FP32, because a vocabulary of
150,000 tokens has much of its mass below the smallest normal FP16 number.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gircse.export.graph.builder import NodeBuilder
from gircse.runtime import tensor_names
from gircse.runtime.errors import ExportError, OptionError
from gircse.runtime.precision import SPECS, Precision

MIXTURE_SCALE = 2048.0
"""A probability of 1 becomes 2048: full FP16 precision down to 3e-8, and rows of E up to 32 stay in range."""

FP16_MAX = 65504.0
"""Largest FP16 number."""

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_LOW = {"MatMul", "Gemm", "Attention", "RotaryEmbedding"}
_MOVING = {"Concat", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
_SWIGLU = {"Mul", "Sigmoid"}
_OPERAND_OF = {"MatMul", "Gemm", "Gather", "Transpose"}
_NO_FLOAT_RESULT = {"Less", "QuantizeLinear", "Shape"}
_REQUIRED = ("MatMul", "Attention", "RotaryEmbedding", "Gather", "insert_cast")


def set_precision(model: ir.Model, precision: Precision, *, keep_float32: Sequence[str] = ()) -> dict[str, int]:
    """Rewrite an FP32 graph in place. Weights only change their type: ``external_data.py`` fills them afterwards.

    Args:
        model: a graph of ``compose_graph``.
        precision: what to rewrite it to; FP32 changes nothing.
        keep_float32: parts of weight names; matrix products with such a weight stay in FP32, the weight included.

    Returns:
        How often each rewrite applied: the low nodes by operator, ``scale_mixture`` and ``insert_cast``.

    Raises:
        ExportError: a rewrite did not apply where it had to.
        OptionError: an entry of ``keep_float32`` matches no weight.
    """
    if precision is Precision.FP32:
        return {}
    graph, low = model.graph, onnx_dtype(precision)
    kept = _kept_weights(graph, keep_float32)
    fp16 = low is ir.DataType.FLOAT16
    counts = Counter({"scale_mixture": scale_mixture(graph)} if fp16 else {})
    low_nodes = find_low_nodes(graph, kept, following=_MOVING | _SWIGLU if fp16 else _MOVING)
    counts.update(node.op_type for node in low_nodes)
    _narrow_weights(graph, low_nodes, kept, low)
    counts["insert_cast"] = _insert_casts(graph, low_nodes, low)
    required = [*_REQUIRED]
    if precision is Precision.FP16:
        required += ["Sigmoid"] if any(node.op_type == "Sigmoid" for node in graph) else []
    if fp16:
        required += ["scale_mixture"] if counts["Gemm"] else []
    if missing := [name for name in required if not counts[name]]:
        raise ExportError(
            f"--precision {precision}",
            f"finds no {missing[0]} to rewrite",
            "every decoder has one",
            "Report this model: its graph has another form.",
        )
    return dict(sorted(counts.items()))


def onnx_dtype(precision: Precision) -> ir.DataType:
    """Return the type of a precision's float weights."""
    return ir.DataType.from_numpy(np.dtype(SPECS[precision].dtype))


def scale_mixture(graph: ir.Graph) -> int:
    """Multiply the probabilities by ``MIXTURE_SCALE`` before the sum over E and divide after it; returns how often."""
    nodes = [node for node in graph if node.op_type == "Gemm"]
    for node in nodes:
        before, after = NodeBuilder.before(graph, node), NodeBuilder.after(graph, node)
        scale = before.constant("mixture_scale", np.array(MIXTURE_SCALE, np.float32))
        users = list(node.outputs[0].uses())
        index, probabilities = _probabilities(node)
        node.replace_input_with(index, before.op("Mul", probabilities, scale))
        restored = after.op("Div", node.outputs[0], scale)
        for user, index in users:
            user.replace_input_with(index, restored)
    return len(nodes)


def _probabilities(node: ir.Node) -> tuple[int, ir.Value]:
    """Return which input of the sum over E is the softmax."""
    for index, value in enumerate(node.inputs):
        producer = value.producer() if value is not None else None
        if value is not None and producer is not None and producer.op_type == "Softmax":
            return index, value
    raise ValueError(f"{node.name}: a sum over E without probabilities")


def find_low_nodes(graph: ir.Graph, kept: set[ir.Value], *, following: set[str]) -> set[ir.Node]:
    """Apply the rules of the module text.

    Args:
        graph: the FP32 graph.
        kept: weights that stay in FP32.
        following: operators that are low where every computed input is.
    """
    floats = _float_values(graph)
    low = {value for value in graph.inputs if _is_cache(value)}
    nodes = set()
    for node in graph:
        weights = [value for value in node.inputs if value is not None and _is_float_weight(value)]
        computed = [value for value in node.inputs if value in floats]
        follows = bool(computed) and all(value in low for value in computed)
        if any(_is_cache(value) for value in node.outputs):
            is_low = True  # what comes out of one step goes into the next
        elif node.op_type in _LOW:
            is_low = kept.isdisjoint(weights)
        elif node.op_type == "Gather" and weights:
            is_low = kept.isdisjoint(weights)
        elif is_operand(node):
            is_low = True
        elif node.op_type == "Add":
            is_low = follows and (bool(weights) or _adds_products(node))
        else:  # but not a product with a constant, such as the scale of Gemma's embeddings
            is_low = follows and node.op_type in following and not (node.op_type == "Mul" and weights)
        if is_low:
            nodes.add(node)
            low.update(node.outputs)
    return nodes


def is_operand(node: ir.Node) -> bool:
    """Whether a node dequantizes an operand of quantized products, or a table that rows are looked up in."""
    users = [user.op_type for output in node.outputs for user in output.consumers()]
    return node.op_type == "DequantizeLinear" and bool(users) and _OPERAND_OF.issuperset(users)


def _adds_products(node: ir.Node) -> bool:
    producers = [value.producer() for value in node.inputs if value is not None]
    return all(producer is not None and producer.op_type == "MatMul" for producer in producers)


def _narrow_weights(graph: ir.Graph, low_nodes: set[ir.Node], kept: set[ir.Value], low: ir.DataType) -> None:
    """Give the low type to every weight that a low node reads, and to the KV cache at the graph's edge."""
    for value in (*graph.inputs, *graph.outputs):
        if _is_cache(value):
            value.type = ir.TensorType(low)
    for value in graph.initializers.values():
        if not _is_float_weight(value) or value in kept or low_nodes.isdisjoint(value.consumers()):
            continue
        value.type = ir.TensorType(low)
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(low.numpy()), low, name=value.name)


def _insert_casts(graph: ir.Graph, low_nodes: set[ir.Node], low: ir.DataType) -> int:
    """Cast every float input that has the other type, once for each value; returns the number of Cast nodes."""
    floats = _float_values(graph)
    types = {value: value.dtype for value in (*graph.inputs, *graph.initializers.values()) if _is_float(value.dtype)}
    casts: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        wanted = low if node in low_nodes else ir.DataType.FLOAT
        for index, value in enumerate(node.inputs):
            if value is None or value not in types or types[value] == wanted or node.op_type == "Shape":
                continue
            if value not in casts:
                casts[value] = NodeBuilder.before(graph, node).op("Cast", value, to=wanted)
                casts[value].type = ir.TensorType(wanted)
            node.replace_input_with(index, casts[value])
        for output in floats.intersection(node.outputs):
            types[output] = wanted
            output.type = ir.TensorType(wanted)
    return len(casts)


def _kept_weights(graph: ir.Graph, names: Sequence[str]) -> set[ir.Value]:
    weights = [value for value in graph.initializers.values() if _is_float_weight(value)]
    kept: set[ir.Value] = set()
    for name in names:
        found = {value for value in weights if name in str(value.name)}
        if not found:
            example = next(str(value.name) for value in weights if len(value.shape or ()) == 2)
            raise OptionError(
                f"--keep-float32 {name}", "matches no weight", f"it takes a part of a name such as {example}"
            )
        kept |= found
    return kept


def _is_cache(value: ir.Value) -> bool:
    return tensor_names.is_cache(str(value.name))


def _is_float(dtype: ir.DataType | None) -> bool:
    return dtype in _FLOATS


def _is_float_weight(value: ir.Value) -> bool:
    return value.is_initializer() and _is_float(value.dtype)


def _float_values(graph: ir.Graph) -> set[ir.Value]:
    """Return every value that is no constant and holds floats: what has a float among its inputs, but for a few."""
    floats = {value for value in graph.inputs if _is_float(value.dtype)}
    for node in graph:
        if node.op_type == "Cast":
            is_float = _is_float(ir.DataType(node.attributes["to"].as_int()))
        else:
            is_float = node.op_type not in _NO_FLOAT_RESULT and any(
                value is not None and (value in floats or _is_float_weight(value)) for value in node.inputs
            )
        if is_float:
            floats.update(node.outputs)
    return floats
