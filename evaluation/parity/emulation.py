"""Run an FP16 or BF16 graph on the CPU as a GPU computes it: FP32 arithmetic, every low value rounded to its type.

ONNX Runtime has no BF16 kernels for the CPU, and few for FP16: it computes FP16 nodes in FP32 and drops the roundings
between them, so its vectors are better than those of a GPU, and an overflow does not show. Here every node that makes
low values makes FP32 values, rounded by a Cast to the low type and back; a GPU, whose matrix products sum in FP32,
differs from that in the order of its sums only. The graph is edited in memory; weights stay as they are on disk.
"""

from pathlib import Path

import onnx_ir as ir

LOW_TYPES = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_WIDE = ir.TensorType(ir.DataType.FLOAT)


def emulated_graph(path: Path, *, copy_weights: bool = True) -> ir.Model:
    """Return the graph of an FP16 or BF16 variant, changed so that it computes the same in FP32.

    Inputs and outputs in the low type become FP32.

    Args:
        path: the graph's file.
        copy_weights: convert each weight once, for all its uses; see ``load_graph``.
    """
    model = ir.load(path)
    graph = model.graph
    nodes = list(graph)
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype in LOW_TYPES:
            value.type = _WIDE
    for node in nodes:
        if node.op_type == "Cast" and node.attributes["to"].as_int() in LOW_TYPES:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        for value in node.outputs:
            if value.dtype in LOW_TYPES:
                _round(graph, node, value)
    for weight in [value for value in graph.initializers.values() if value.dtype in LOW_TYPES]:
        if copy_weights:
            wide = ir.Value(type=_WIDE)
            weight.replace_all_uses_with(wide)
            graph.insert_before(nodes[0], cast(weight, ir.DataType.FLOAT, wide))
        else:
            _convert_for_each_use(graph, weight)
    return model


def _convert_for_each_use(graph: ir.Graph, weight: ir.Value) -> None:
    for node, index in list(weight.uses()):
        wide = ir.Value(type=_WIDE)
        node.replace_input_with(index, wide)
        graph.insert_before(node, cast(weight, ir.DataType.FLOAT, wide))


def _round(graph: ir.Graph, node: ir.Node, exact: ir.Value) -> None:
    """Let every reader of a value read it rounded; the rounded value takes its name, by which a probe finds it."""
    low = exact.dtype
    name, shape = exact.name, exact.shape
    rounded, wide = ir.Value(), ir.Value(type=_WIDE, shape=shape)
    exact.replace_all_uses_with(wide)
    exact.name, exact.type, wide.name = f"{name}.exact", _WIDE, name
    graph.insert_after(node, (cast(exact, low, rounded), cast(rounded, ir.DataType.FLOAT, wide)))


def cast(value: ir.Value, to: ir.DataType | None, result: ir.Value) -> ir.Node:
    """Return a node that casts a value to a type; ``result`` becomes its output."""
    return ir.node("Cast", [value], {"to": to}, outputs=[result])
