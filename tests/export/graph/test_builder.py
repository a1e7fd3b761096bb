"""Nodes and constants in their places."""

import numpy as np
import onnx_ir as ir

from gircse.export.graph.builder import NodeBuilder


def finished_graph() -> tuple[ir.Graph, ir.Node]:
    """Return y = Relu(x) with a Neg behind it, and the Relu."""
    x = ir.val("x", ir.DataType.FLOAT, [2])
    relu = ir.node("Relu", [x])
    neg = ir.node("Neg", [relu.outputs[0]])
    return ir.Graph([x], [neg.outputs[0]], nodes=[relu, neg], opset_imports={"": 23}), relu


def test_nodes_stand_in_the_order_in_which_they_were_made() -> None:
    for make, expected in (
        (NodeBuilder.before, ["Abs", "Sqrt", "Relu", "Neg"]),
        (NodeBuilder.after, ["Relu", "Abs", "Sqrt", "Neg"]),
    ):
        graph, relu = finished_graph()
        builder = make(graph, relu)
        builder.op("Sqrt", builder.op("Abs", graph.inputs[0]))
        assert [node.op_type for node in graph] == expected


def test_a_constant_is_made_once() -> None:
    graph, relu = finished_graph()
    before, after = NodeBuilder.before(graph, relu), NodeBuilder.after(graph, relu)
    assert before.number(0.5) is after.number(0.5)
    assert before.indices([1, 2]) is after.indices([1, 2])
    assert before.index(1) is not before.indices([1])
    assert set(graph.initializers) == {"float_0.5", "ints_1_2", "int_1", "ints_1"}
    assert before.number(1).dtype is ir.DataType.FLOAT
    np.testing.assert_array_equal(graph.initializers["ints_1_2"].const_value.numpy(), [1, 2])


def test_an_initializer_has_a_type_and_no_value() -> None:
    graph, relu = finished_graph()
    value = NodeBuilder.before(graph, relu).initializer("weight", ir.DataType.INT8, (2, 3))
    assert (value.dtype, value.const_value, graph.initializers["weight"]) == (ir.DataType.INT8, None, value)


def test_a_branch_has_names_of_its_own_and_the_constants_of_its_graph() -> None:
    graph, relu = finished_graph()
    branch = NodeBuilder.before(graph, relu).branch("then")
    subgraph = branch.graph_of(branch.op("Mul", graph.inputs[0], branch.number(2.0)))
    assert [node.name for node in subgraph] == ["then/node_0"]
    assert [output.name for output in subgraph.outputs] == ["then/value_0"]
    assert set(graph.initializers) == {"float_2.0"}
    assert not subgraph.initializers
