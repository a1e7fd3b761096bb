"""Run a BF16 graph on the CPU, where ONNX Runtime has no BF16 kernels: FP32 arithmetic, every BF16 value rounded to BF16.

That is what a GPU computes, whose matrix products take BF16 and sum in FP32, up to the order of the sums. The graph is
edited in memory; weights stay BF16 on disk and are widened when the session loads.
"""

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

WIDE = ".float32"


def emulated_graph(path: Path) -> Any:
    """Return the graph of a BF16 variant as an ``onnx.ModelProto`` that computes the same in FP32.

    Every node that makes BF16 values makes FP32 values, rounded by a Cast to BF16 and back. Inputs and outputs in BF16
    become FP32.

    Args:
        path: the graph's file.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    low = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.BFLOAT16}
    nodes = [helper.make_node("Cast", [name], [name + WIDE], to=TensorProto.FLOAT) for name in sorted(low)]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    rounded = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    for node in graph.node:
        node.input[:] = [name + WIDE if name in low else name for name in node.input]
        if node.op_type == "Cast" and helper.get_node_attr_value(node, "to") == TensorProto.BFLOAT16:
            rounded.add(node.output[0])
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in rounded:
                node.output[index] = name + ".exact"
                nodes.append(helper.make_node("Cast", [name + ".exact"], [name + ".bf16"], to=TensorProto.BFLOAT16))
                nodes.append(helper.make_node("Cast", [name + ".bf16"], [name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return model
