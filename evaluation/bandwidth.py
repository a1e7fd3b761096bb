"""The roofline of small batches: bytes of weights that a run must read, over what the memory can deliver."""

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from gircse.runtime.bundle import Bundle, Layout

BUFFER_BYTES = 1 << 30
"""Larger than the caches of most machines."""

REPEATS = 5


def memory_bandwidth(threads: int) -> float:
    """Measure how fast so many threads read memory, in bytes per second: the best of a few sums over 1 GiB."""
    parts = np.array_split(np.ones(BUFFER_BYTES // 4, np.float32), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(REPEATS):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            seconds.append(time.perf_counter() - start)
    return BUFFER_BYTES / min(seconds)


def weight_bytes_read(bundle: Bundle, precision: str, *, steps: int) -> int:
    """Return the bytes of weights that one run reads, each as often as a node takes it as an input.

    Rows looked up by Gather, which reads a few of them, are not counted.

    Args:
        bundle: an opened bundle.
        precision: name of one of its variants.
        steps: k; an unrolled graph reads for all K.
    """
    graphs = bundle.manifest.variants[precision].graphs
    counts = {role: _bytes_read(bundle.file(graph.path)) for role, graph in graphs.items()}
    if bundle.manifest.graph.layout is Layout.UNROLLED:
        return counts["model"]
    return counts["prefill"] + steps * counts.get("step", 0)


@functools.cache  # the same few graphs are asked for at every setting
def _bytes_read(path: Path) -> int:
    graph = onnx.load(path, load_external_data=False).graph
    sizes = {tensor.name: _tensor_bytes(tensor) for tensor in graph.initializer}
    return sum(sizes.get(name, 0) for node in graph.node if node.op_type != "Gather" for name in node.input)


def _tensor_bytes(tensor: Any) -> int:
    item: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(np.prod(tensor.dims)) * item
