"""Run a FP16 or BF16 graph on the CPU as a GPU computes it: FP32 arithmetic, every low value rounded to its type.

ONNX Runtime has no BF16 kernels for the CPU, and few for FP16: it computes FP16 nodes in FP32 and drops the roundings
between them, so its vectors are better than those of a GPU, and an overflow does not show. Here every node that makes
low values makes FP32 values, rounded by a Cast to the low type and back; a GPU, whose matrix products sum in FP32,
differs from that in the order of its sums only. The graph is edited in memory; weights stay as they are on disk.
"""

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

_LOW = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
_WIDE = ".float32"


def emulated_graph(path: Path) -> Any:
    """Return the graph of a FP16 or BF16 variant as an ``onnx.ModelProto`` that computes the same in FP32.

    Inputs and outputs in the low type become FP32.

    Args:
        path: the graph's file.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type in _LOW}
    low = {value.name: _element_type(value) for value in graph.value_info if _element_type(value) in _LOW}
    for value in (*graph.input, *graph.output):
        if _element_type(value) in _LOW:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes = [helper.make_node("Cast", [name], [name + _WIDE], to=TensorProto.FLOAT) for name in sorted(weights)]
    for node in graph.node:
        node.input[:] = [name + _WIDE if name in weights else name for name in node.input]
        if node.op_type == "Cast" and helper.get_node_attr_value(node, "to") in _LOW:
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in low:
                exact, rounded = f"{name}.exact", f"{name}.rounded"
                node.output[index] = exact
                nodes.append(helper.make_node("Cast", [exact], [rounded], to=low[name]))
                nodes.append(helper.make_node("Cast", [rounded], [name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return model


def _element_type(value: Any) -> int:
    element_type: int = value.type.tensor_type.elem_type
    return element_type
