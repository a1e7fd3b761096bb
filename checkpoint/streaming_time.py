"""How long a streamed reference will take, from what one layer of it takes on this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gircse.checkpoint.streamed_model import StreamedModel
from gircse.checkpoint.tensor_naming import EMBEDDING_TABLE

MANY_ROWS = 256


@dataclass(frozen=True)
class StreamingRates:
    """What a decoder layer takes, in seconds.

    Attributes:
        read: to read its weights and merge the adapter.
        product: its matrix products with one token, which read every weight.
        row: its matrix products for each token.
        block: to read a block of rows of the vocabulary.
        overlap: share of the shorter of reading and computing that goes on beside the longer one.
    """

    read: float
    product: float
    row: float
    block: float
    overlap: float

    @classmethod
    def measure(cls, streamed: StreamedModel) -> Self:
        """Read one layer, and multiply with its largest weight."""
        last = streamed.num_layers - 1  # after the last one, none is read ahead
        for _ in streamed.layers(start=last):
            pass  # imports PEFT and allocates memory, once
        start = time.perf_counter()
        for name in streamed.layers(start=last):
            read = time.perf_counter() - start
            weights = list(streamed.model.get_submodule(name).parameters())
            largest = max(weights, key=Tensor.numel)
            share = sum(weight.numel() for weight in weights) / largest.numel()
            product, many = (share * _product_seconds(largest, rows) for rows in (1, MANY_ROWS))
        start = time.perf_counter()
        next(streamed.weights.blocks(EMBEDDING_TABLE))
        block = time.perf_counter() - start
        # Reading computes too: it converts and merges on the cores that a CPU's products take.
        overlap = 0.0 if streamed.device.type == "cpu" else 1.0
        return cls(read, product, max(many - product, 0) / MANY_ROWS, block, overlap)

    def layer(self, *, rows: int, batches: int, read: float) -> float:
        """Return the seconds of one layer, or as many weights, with ``rows`` tokens in all in a number of batches.

        Args:
            rows: tokens.
            batches: products.
            read: seconds to read the weights, 0 if they are there.
        """
        compute = batches * self.product + rows * self.row
        return max(read, compute) + (1 - self.overlap) * min(read, compute)


def shortest_seconds(work: Callable[[], object], *, repeats: int = 3) -> float:
    """Return the shortest time that some work takes, what it starts on a GPU included; the first one warms up."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _product_seconds(weight: Tensor, rows: int) -> float:
    inputs = torch.ones(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    return shortest_seconds(lambda: F.linear(inputs, weight))
