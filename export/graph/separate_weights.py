"""A graph in which every use of a low-precision weight has an initializer of its own, for a CPU with little memory.

The CPU converts FP16 weights to FP32. An unrolled graph reads each of them K + 1 times, and ONNX Runtime converts it
once for all: what a 7B takes is then 26 GB, held from the prompt to the last step. With an initializer for each use,
all at the same place of the file, each conversion is free after its product (``load_graph``, ``copy_weights``).
"""

from pathlib import Path

import onnx_ir as ir

_LOW = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def separate_weights(path: Path) -> bytes:
    """Return the edited graph; weights stay in the files beside ``path``."""
    model = ir.load(path)
    for weight in [value for value in model.graph.initializers.values() if value.dtype in _LOW]:
        for number, (node, index) in enumerate(list(weight.uses())[1:], start=1):
            name = f"{weight.name}.{number}"
            same = ir.Value(name=name, type=weight.type, shape=weight.shape, const_value=weight.const_value)
            model.graph.register_initializer(same)
            node.replace_input_with(index, same)
    content: bytes = ir.to_proto(model).SerializeToString()
    return content
