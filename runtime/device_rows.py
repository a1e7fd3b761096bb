"""Spreads the keys and values of a prefix to every row of a batch, on the GPU that has computed them.

Copied by the host, they would cost what the prefix saves. ONNX Runtime has no call for it, so a graph of one operator
does it: rows = Expand(prefix, shape).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np

_FLOAT = 1
"""ONNX's number of FP32, whose elements have four bytes; those of the other types of a KV cache have two."""


def expand_model(onnx_type: int) -> bytes:
    """Return an ONNX model: y = Expand(x, s), x and y of a type and three dimensions, s int64 (3,)."""
    tensor = b"\x12\x0c\n\n\x08" + bytes([onnx_type]) + b"\x12\x06\n\x00\n\x00\n\x00"
    return (
        b'\x08\x08:M\n\x11\n\x01x\n\x01s\x12\x01y"\x06Expand\x12\x01rZ\x11\n\x01x'
        + tensor
        + b"Z\x0f\n\x01s\x12\n\n\x08\x08\x07\x12\x04\n\x02\x08\x03b\x11\n\x01y"
        + tensor
        + b"B\x04\n\x00\x10\r"
    )


class DeviceTensor(NamedTuple):
    """A tensor on the GPU.

    Attributes:
        value: ``onnxruntime.OrtValue``.
        onnx_type: ONNX's number of its type.
        shape: (1, tokens, kv).
        nbytes: its size.
    """

    value: Any
    onnx_type: int
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, value: Any) -> Self:
        """Wrap an ``onnxruntime.OrtValue``."""
        onnx_type, shape = value.element_type(), tuple(value.shape())
        return cls(value, onnx_type, shape, int(np.prod(shape)) * (4 if onnx_type == _FLOAT else 2))


class RowExpander:
    """Repeats a row on the GPU. Safe to call from several threads."""

    def __init__(self, load: Callable[..., Any], device: str) -> None:
        """Load nothing yet.

        Args:
            load: makes an ``onnxruntime.InferenceSession`` of the model that it is given as ``content``.
            device: ONNX Runtime's name of the GPU.
        """
        self._load, self._device = functools.cache(load), device

    def __call__(self, tensor: DeviceTensor, rows: int) -> Any:
        """Return an ``onnxruntime.OrtValue`` (rows, tokens, kv) on the GPU."""
        graph = self._load(content=expand_model(tensor.onnx_type))
        binding = graph.io_binding()
        binding.bind_ortvalue_input("x", tensor.value)
        binding.bind_cpu_input("s", np.array([rows, *tensor.shape[1:]], np.int64))
        binding.bind_output("y", self._device)
        graph.run_with_iobinding(binding)
        (repeated,) = binding.get_outputs()
        return repeated
