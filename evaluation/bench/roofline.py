"""The roofline of small batches: bytes of weights that a run must read, over what the memory can deliver."""

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir

from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider

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


def weight_bytes_read(bundle: Bundle, precision: str, *, layout: Layout | None = None, steps: int) -> int:
    """Return the bytes of weights that one run reads, each as often as a node takes it as an input.

    Rows looked up by Gather, which reads a few of them, are not counted.

    Args:
        bundle: an opened bundle.
        precision: name of one of its variants.
        layout: graph; None is the one that the CPU takes.
        steps: k; an unrolled graph reads for all K.
    """
    facts = bundle.manifest.graph
    layout = bundle.layout(precision, Provider.CPU, layout)
    decoder, vocabulary = _bytes_read(bundle.graph(precision, layout), facts.vocab_size)
    if layout is Layout.UNROLLED:
        return decoder + vocabulary
    return (1 + steps) * decoder + steps * vocabulary


@functools.cache  # the same few graphs are asked for at every setting
def _bytes_read(path: Path, vocab_size: int) -> tuple[int, int]:
    """Return the bytes of decoder weights and of vocabulary weights that the nodes of a graph read."""
    graph = ir.load(path).graph
    read = [
        value.const_value
        for node in graph
        if node.op_type != "Gather"
        for value in node.inputs
        if value is not None and value.const_value is not None and value.is_initializer()
    ]
    vocabulary = sum(tensor.nbytes for tensor in read if vocab_size in tensor.shape.numpy())
    return sum(tensor.nbytes for tensor in read) - vocabulary, vocabulary
