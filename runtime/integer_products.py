"""What ONNX Runtime has to be told about 8-bit integers: whether it multiplies them exactly on this CPU is tried.

On x86 with AVX2 or AVX-512 but without VNNI, its kernels for uint8 times int8 add two products in 16 bits, which
saturate. ``session.x64quantprecision`` makes the weights uint8 there, whose kernels are slower and exact; elsewhere
that would cost memory and break graphs that need none of it. So the CPU is asked, not its flags: AVX alone, ARM and
future kernels are exact or not, whatever they are called.
"""

import functools
from typing import Any

import numpy as np

from gircse.runtime.provider import Provider

EXACT_PRODUCTS = ("session.x64quantprecision", "1")
"""The option of a session that makes the products exact where they are not."""

FLOAT_PRODUCTS = ("session.disable_quant_qdq", "1")
"""The option of a session that only stores integers: they become FP32 once, when it is loaded. By default each product
would convert its weights again, in every pass, which takes eight times as long as the products."""

ROWS = 4
PROBE = (
    b'\x08\x08:d\n\x18\n\x01a\n\x01b\x12\x01c"\rMatMulInteger\x12\x01p*\x1b\x08\x04\x08\x04\x10\x03B\x01bJ\x10'
    + b"\x7f" * ROWS * ROWS
    + b"Z\x13\n\x01a\x12\x0e\n\x0c\x08\x02\x12\x08\n\x02\x08\x04\n\x02\x08\x04"
    + b"b\x13\n\x01c\x12\x0e\n\x0c\x08\x06\x12\x08\n\x02\x08\x04\n\x02\x08\x04B\x04\n\x00\x10\r"
)
"""An ONNX model: c = MatMulInteger(a, b), a uint8 (4, 4), b int8 (4, 4) all 127."""


def integer_option(onnxruntime: Any, provider: Provider, *, integer_products: bool) -> tuple[str, str] | None:
    """Return the option that a session needs.

    Args:
        onnxruntime: the module.
        provider: one of ONNX Runtime's.
        integer_products: the graph multiplies 8-bit integers.
    """
    if not integer_products:
        return FLOAT_PRODUCTS
    return EXACT_PRODUCTS if provider is Provider.CPU and products_saturate(onnxruntime) else None


@functools.cache
def products_saturate(onnxruntime: Any) -> bool:
    """Return whether the CPU provider gives wrong products unless told otherwise; takes a few milliseconds, once."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(PROBE, options, providers=[("CPUExecutionProvider", {})])
    (found,) = session.run(None, {"a": np.full((ROWS, ROWS), 255, np.uint8)})
    return not np.array_equal(found, np.full((ROWS, ROWS), ROWS * 255 * 127))
