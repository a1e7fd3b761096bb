"""The form of an INT8 graph that TensorRT takes, made in memory when an engine is built; the weights stay where they are.

The bundle's ``int8`` graph is written for CPUs: float parts in FP32, table rows looked up as integers, soft tokens mixed
from the likeliest tokens, with a branch for a flat softmax. TensorRT has no fused attention in FP32 and refuses to gather
int8 constants, and a GPU reads the vocabulary so fast that the whole sum needs no approximation::

    rows         DQ(Gather(E, ids)) * Gather(scale, ids)    ->  Gather(DQ(E, scale), ids)
    soft token   likeliest tokens + tail, or the branch     ->  softmax(logits) @ DQ(E, scale)
    activations  integers around 128                        ->  around 0, the only zero point that TensorRT knows
    scales       one for QuantizeLinear and its inverse     ->  FP32 for the one, FP16 for the other, the same number
    float parts  FP32                                       ->  FP16 by the rules of ``precision.py``
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gircse.export.graph.mixed_precision import is_operand, set_precision
from gircse.runtime import tensor_names
from gircse.runtime.errors import ExportError
from gircse.runtime.precision import Precision

INTEGER_SUFFIX, SCALE_SUFFIX = ".int8", ".scale"
"""How the recipes of ``int8_weights.py``, which need torch, name a weight and its scales."""

MAX_SCALE_ERROR = 0.01
"""Largest relative error of a scale in FP16. Only scales far below its normal numbers reach it."""


def to_engine_form(model: ir.Model) -> dict[str, int]:
    """Rewrite an ``int8`` graph in place.

    Args:
        model: the graph of the bundle, its weights readable.

    Returns:
        How often each rewrite applied.

    Raises:
        ExportError: the graph is not of the form above, or a scale does not fit into FP16.
    """
    graph = model.graph
    counts = dict(zip(("gather_rows", "mix_all_tokens"), _use_dequantized_table(graph), strict=True))
    counts["center_activations"] = _center_activations(graph)
    counts["separate_scales"] = _separate_scales(graph)
    RemoveUnusedNodesPass()(model)
    return counts | set_precision(model, Precision.FP16)


def _use_dequantized_table(graph: ir.Graph) -> tuple[int, int]:
    """Read rows and mixtures from the dequantized table; returns how many lookups and mixtures there were."""
    lookups = [node for node in graph if node.op_type == "Gather" and _dtype(node.inputs[0]) is ir.DataType.INT8]
    branches = [node for node in graph if node.op_type == "If"]
    if not lookups:  # the calibration kept the vocabulary in float
        return 0, 0
    table = _present(lookups[0].inputs[0])
    scale = graph.initializers[str(table.name).removesuffix(INTEGER_SUFFIX) + SCALE_SUFFIX]
    wide = ir.node("DequantizeLinear", [table, scale], {"axis": 0})
    graph.insert_before(graph[0], wide)
    _share_table(graph, wide, table, scale)
    count = 0
    for lookup in lookups:
        # Gather, DequantizeLinear, Mul by the rows' scales; those of the likeliest tokens go with the branch.
        scaled = _only_user(_only_user(lookup.outputs[0]).outputs[0])
        if scaled.op_type == "Mul":
            rows = ir.node("Gather", [wide.outputs[0], lookup.inputs[1]])
            graph.insert_before(scaled, rows)
            scaled.outputs[0].replace_all_uses_with(rows.outputs[0])
            count += 1
    for branch in branches:
        logits = next(value for value in _values(graph) if str(value.name).endswith("/" + tensor_names.LOGITS))
        columns = ir.node("Transpose", [logits], {"perm": [1, 0]})
        probabilities = ir.node("Softmax", [columns.outputs[0]], {"axis": 0})
        mixed = ir.node("Gemm", [wide.outputs[0], probabilities.outputs[0]], {"transA": 1})
        rows = ir.node("Transpose", [mixed.outputs[0]], {"perm": [1, 0]})
        graph.insert_before(branch, (columns, probabilities, mixed, rows))
        branch.outputs[0].replace_all_uses_with(rows.outputs[0])
        _release_inputs(branch)
    return count, len(branches)


def _share_table(graph: ir.Graph, wide: ir.Node, table: ir.Value, scale: ir.Value) -> None:
    """Let a tied lm_head read the table: the bundle has it a second time, transposed, for the kernels of CPUs."""
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if node is not wide and weight is not None and _is_transpose(weight, node.inputs[1], table, scale):
            transposed = ir.node("Transpose", [wide.outputs[0]], {"perm": [1, 0]})
            graph.insert_before(node, transposed)
            node.outputs[0].replace_all_uses_with(transposed.outputs[0])


def _is_transpose(weight: ir.Value, weight_scale: ir.Value | None, table: ir.Value, scale: ir.Value) -> bool:
    if weight_scale is None or weight_scale.shape != scale.shape or not weight.is_initializer():
        return False
    return np.array_equal(_numbers(weight_scale), _numbers(scale)) and np.array_equal(
        _numbers(weight).T, _numbers(table)
    )


def _center_activations(graph: ir.Graph) -> int:
    """Make unsigned activations signed: 0 to 255 around 128 are the steps of -128 to 127 around 0."""
    nodes = [node for node in graph if len(node.inputs) > 2 and _dtype(node.inputs[2]) is ir.DataType.UINT8]
    tensor = ir.tensor(np.array(0, np.int8), name="int8_zero")
    zero = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(()), const_value=tensor)
    if nodes:
        graph.initializers.add(zero)
    for node in nodes:
        node.replace_input_with(2, zero)
        if node.op_type == "QuantizeLinear":
            node.outputs[0].type = ir.TensorType(ir.DataType.INT8)
    return len(nodes)


def _separate_scales(graph: ir.Graph) -> int:
    """Give QuantizeLinear a scale of its own, FP32, and round both to FP16 so that they stay the same number.

    The scale of a second digit, which no operand shares, stays as it is.

    Returns:
        How many operands of products have a scale in FP16 now.
    """
    nodes = [node for node in graph if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    narrowed = {node.inputs[1] for node in nodes if is_operand(node)}
    count = 0
    for node in nodes:
        scale = _present(node.inputs[1])
        if scale not in narrowed:
            continue
        low = is_operand(node)
        name = f"{scale.name}.{'low' if low else 'rounded'}"
        if name not in graph.initializers:
            value = _rounded(scale)
            tensor = ir.tensor(value, name=name)
            graph.initializers.add(
                ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(value.shape), const_value=tensor)
            )
        node.replace_input_with(1, graph.initializers[name])
        count += low
    return count


def _rounded(scale: ir.Value) -> np.ndarray:
    """Return a scale rounded to FP16, in FP32."""
    exact = _numbers(scale)
    with np.errstate(over="ignore"):  # infinity is refused below
        rounded = exact.astype(np.float16).astype(np.float32)
    error = float(np.max(np.abs(rounded / exact - 1)))
    if not error <= MAX_SCALE_ERROR:
        raise ExportError(
            f"{scale.name}: FP16 changes a scale by {error:.2g} of its value | at most {MAX_SCALE_ERROR} | keep its product "
            "in float: --keep-float32 at the export"
        )
    return rounded


def _release_inputs(branch: ir.Node) -> None:
    """Let go of what the subgraphs of an If read from around it, which would count as used for ever."""
    for attribute in branch.attributes.values():
        for node in attribute.as_graph():
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)


def _numbers(value: ir.Value) -> np.ndarray:
    if value.const_value is None:
        raise ValueError(f"{value.name}: a weight or scale that is not stored")
    return value.const_value.numpy()


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [value for node in graph for value in node.outputs]


def _only_user(value: ir.Value) -> ir.Node:
    (user,) = value.consumers()
    return user


def _present(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise ValueError("an operator without its input")
    return value


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    return value.dtype if value is not None else None
