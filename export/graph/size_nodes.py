"""Find the nodes that read nothing but sizes of tensors, which ONNX Runtime may run on the CPU for a GPU's sake."""

import onnx_ir as ir


def size_nodes(graph: ir.Graph) -> list[str]:
    """Return the names of the nodes whose results depend on the sizes of a graph's inputs and not on what is in them.

    Args:
        graph: its nodes in an order in which they can run. Branches of an ``If`` are not looked into.
    """
    names: list[str] = []
    sizes: set[ir.Value] = set()
    for node in graph:
        computed = [value for value in node.inputs if value is not None and not value.is_initializer()]
        if node.op_type == "Shape" or (computed and sizes.issuperset(computed)):
            names.append(str(node.name))
            sizes.update(node.outputs)
    return names
