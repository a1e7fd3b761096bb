"""Keep the KV cache of an FP32 graph in FP16 between its runs: half of its memory, which at large batches is most.

The new keys and values are rounded, and what attention reads is widened again, so every product stays in FP32::

    present = Concat(past, key)                attention reads present
    present = Concat(past, FP16(key))          attention reads FP32(present)

Keys and values are rounded by 5e-4 of their size at most, far below the rounding of the 8-bit products around them. On
the demo the vectors are as near to FP32 as before, where 8 bits for the cache were not (``docs/design-notes.md``).
"""

import onnx_ir as ir

from gircse.export.graph.builder import NodeBuilder
from gircse.runtime import tensor_names
from gircse.runtime.errors import ExportError


def narrow_cache(graph: ir.Graph) -> int:
    """Rewrite a stepwise graph in place; other layouts have no cache at their edge.

    Returns:
        How many tensors of the cache are FP16 now.

    Raises:
        ExportError: a tensor of the cache is not made by appending to its past.
    """
    outputs = [value for value in graph.outputs if tensor_names.is_cache(str(value.name))]
    for present in outputs:
        append = present.producer()
        if append is None or append.op_type != "Concat" or len(append.inputs) != 2:
            raise ExportError(
                str(present.name),
                "is not made by appending to its past",
                "every decoder layer makes it so",
                "Report this model: its graph has another form.",
            )
        past, new = append.inputs
        readers = list(present.uses())
        append.replace_input_with(1, NodeBuilder.before(graph, append).op("Cast", new, to=ir.DataType.FLOAT16))
        wide = NodeBuilder.after(graph, append).op("Cast", present, to=ir.DataType.FLOAT)
        for user, index in readers:
            user.replace_input_with(index, wide)
        for value in (past, present):
            if value is not None:
                value.type = ir.TensorType(ir.DataType.FLOAT16)
    return len(outputs)
