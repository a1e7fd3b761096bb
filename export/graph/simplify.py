"""Rewrites that make a traced decoder compact. Each changes the graph in place and returns how often it applied.

They look at operators and recorded symbolic shapes only, never at values, so fake weights pass through them.
Before and after, one attention input of one layer::

    MatMul - Reshape - Transpose - Transpose - Reshape - RotaryEmbedding      (and six nodes per Reshape's shape)
    MatMul - RotaryEmbedding
"""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass

from gircse.export.graph.builder import NodeBuilder

_TRANSPOSE_OF = "transpose_of"
"""Key under which an initializer knows the tensor of the checkpoint that it is the transpose of."""


def simplify_decoder(graph: ir.Graph) -> dict[str, int]:
    """Apply every rewrite in order, and after each drop the nodes that it left unused.

    Returns:
        How often each one applied, by function name.
    """
    rewrites = (
        share_constants,
        drop_identities,
        fold_weight_transposes,
        move_transposes_past_norms,
        cancel_transposes,
        collapse_reshapes,
        drop_identity_reshapes,
        make_reshapes_static,
    )
    counts = {}
    for rewrite in rewrites:
        counts[rewrite.__name__] = rewrite(graph)
        RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))
    return counts


def share_constants(graph: ir.Graph) -> int:
    """Replace every ``Constant`` by an initializer, one for each value."""
    count = 0
    for node in _nodes(graph, "Constant"):
        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        if tensor is None:
            continue
        value = tensor.numpy()
        name = "_".join(("constant", value.dtype.name, *map(str, value.shape), *map(repr, value.reshape(-1).tolist())))
        node.outputs[0].replace_all_uses_with(NodeBuilder.before(graph, node).constant(name, value))
        count += 1
    return count


def drop_identities(graph: ir.Graph) -> int:
    """Remove ``Identity``, which copies and dropouts leave behind."""
    count = len(list(_nodes(graph, "Identity")))
    IdentityEliminationPass()(ir.Model(graph, ir_version=10))
    return count


def fold_weight_transposes(graph: ir.Graph) -> int:
    """Replace ``Transpose(weight)`` by an initializer ``weight.T``, to be stored that way."""
    count = 0
    for node in _nodes(graph, "Transpose"):
        weight = node.inputs[0]
        if weight is None or not weight.is_initializer() or weight.shape is None:
            continue
        name = f"{weight.name}.T"
        if name not in graph.initializers:
            shape = ir.Shape(tuple(reversed(tuple(weight.shape))))
            transposed = ir.val(name, type=weight.type, shape=shape)
            transposed.meta[_TRANSPOSE_OF] = weight.name
            graph.initializers.add(transposed)
        node.outputs[0].replace_all_uses_with(graph.initializers[name])
        count += 1
    return count


def transpose_of(weight: ir.Value) -> str | None:
    """Return the checkpoint tensor that an initializer is the transpose of; None for one that is no transpose."""
    tensor: str | None = weight.meta.get(_TRANSPOSE_OF)
    return tensor


def move_transposes_past_norms(graph: ir.Graph) -> int:
    """Normalize before a ``Transpose`` that leaves the normalized axis where it is, not after it."""
    count = 0
    for node in _nodes(graph, "RMSNormalization"):
        transpose = _producer(node, "Transpose")
        if transpose is None or node.attributes["axis"].as_int() != -1:
            continue
        perm = tuple(transpose.attributes["perm"].as_ints())
        source, normalized = transpose.inputs[0], node.outputs[0]
        if perm[-1] != len(perm) - 1 or source is None:
            continue
        node.replace_input_with(0, source)
        users = list(normalized.uses())
        transposed = NodeBuilder.after(graph, node).op("Transpose", normalized, perm=perm)
        transposed.type, transposed.shape = normalized.type, normalized.shape
        normalized.shape = source.shape
        for user, index in users:
            user.replace_input_with(index, transposed)
        count += 1
    return count


def cancel_transposes(graph: ir.Graph) -> int:
    """Replace ``Transpose(Transpose(x))`` by x where the second undoes the first."""
    count = 0
    for node in _nodes(graph, "Transpose"):
        inner = _producer(node, "Transpose")
        if inner is None or inner.inputs[0] is None:
            continue
        first, second = (tuple(n.attributes["perm"].as_ints()) for n in (inner, node))
        if tuple(first[axis] for axis in second) == tuple(range(len(first))):
            node.outputs[0].replace_all_uses_with(inner.inputs[0])
            count += 1
    return count


def collapse_reshapes(graph: ir.Graph) -> int:
    """Let ``Reshape(Reshape(x))`` read x itself."""
    count = 0
    for node in _nodes(graph, "Reshape"):
        inner = _producer(node, "Reshape")
        if inner is not None:
            node.replace_input_with(0, inner.inputs[0])
            count += 1
    return count


def drop_identity_reshapes(graph: ir.Graph) -> int:
    """Remove a ``Reshape`` whose output has the same symbolic shape as its input."""
    count = 0
    for node in _nodes(graph, "Reshape"):
        source, target = node.inputs[0], node.outputs[0]
        if source is not None and _dims(source) is not None and _dims(source) == _dims(target):
            target.replace_all_uses_with(source)
            count += 1
    return count


def make_reshapes_static(graph: ir.Graph) -> int:
    """Replace a computed target shape by a constant: 0 copies a dimension of the input, -1 is the one left over."""
    count = 0
    for node in _nodes(graph, "Reshape"):
        source, target = node.inputs[0], node.outputs[0]
        before, after = (None if source is None else _dims(source)), _dims(target)
        if before is None or after is None:
            continue
        dims = [
            dim if isinstance(dim, int) else 0 if axis < len(before) and dim == before[axis] else -1
            for axis, dim in enumerate(after)
        ]
        if dims.count(-1) > 1:
            continue
        name = "shape_" + "_".join(map(str, dims))
        node.replace_input_with(1, NodeBuilder.before(graph, node).constant(name, np.array(dims, np.int64)))
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        count += 1
    return count


def _nodes(graph: ir.Graph, op_type: str) -> Iterable[ir.Node]:
    return [node for node in graph if node.op_type == op_type]


def _producer(node: ir.Node, op_type: str) -> ir.Node | None:
    """Return the node that makes the first input, if it is of that type."""
    producer = None if node.inputs[0] is None else node.inputs[0].producer()
    return producer if producer is not None and producer.op_type == op_type else None


def _dims(value: ir.Value) -> list[int | str] | None:
    """Return the symbolic shape, or None if a dimension is unknown."""
    if value.shape is None:
        return None
    dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return None if None in dims else [dim for dim in dims if dim is not None]
