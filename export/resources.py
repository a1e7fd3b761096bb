"""What an export takes of disk and memory, from headers alone, and whether it is there."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gircse.checkpoint.available_memory import available_memory
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.tensor_naming import EMBEDDING_TABLE
from gircse.export.graph.mixed_precision import onnx_dtype
from gircse.reporting.sizes import gib
from gircse.runtime.errors import ExportError, OutputError
from gircse.runtime.precision import SPECS, Precision

TRACE_BYTES = 1 << 30
"""Memory of torch, transformers and the graphs while nothing else is held (measured: 0.8 GiB on 28 layers)."""

SMALL_FILES_BYTES = 64 << 20
"""Disk space for everything in a bundle but the weights."""

_DECODER_BYTES = {
    Precision.INT8: 1.25,
    Precision.INT8_WEIGHTS: 1.25,
    Precision.INT4_WEIGHTS: 0.8,
    Precision.FP8: 1.25,
}
"""Bytes of a decoder weight in quantized variants, scales and outlier channels included (demo: 1.03, 1.09, 0.63 and
1.01)."""


@dataclass(frozen=True)
class ExportNeeds:
    """What an export takes, in bytes.

    Attributes:
        weights: disk for the weights of each variant.
        disk: for the whole bundle.
        memory: to trace the model and write its weights.
    """

    weights: Mapping[Precision, int]
    disk: int
    memory: int

    @classmethod
    def of(cls, weights: ModelWeights, precisions: Sequence[Precision]) -> Self:
        """Add up what a model takes in some precisions."""
        written = {precision: _written_bytes(weights, precision) for precision in precisions}
        memory = TRACE_BYTES + 3 * weights.largest_read_bytes
        return cls(written, sum(written.values()) + SMALL_FILES_BYTES, memory)

    def check_memory(self) -> None:
        """Refuse to start without the memory.

        Raises:
            ExportError: it does not suffice.
        """
        if self.memory > (free := available_memory()):
            raise ExportError(
                "memory", f"has {gib(free)} available", f"the export needs {gib(self.memory)}", "Close other programs."
            )


def check_disk(where: str, what: str, place: Path, needed: int) -> None:
    """Refuse a disk that is too small.

    Args:
        where: something will be written, in words.
        what: will be written, in words.
        place: path of what will be written.
        needed: bytes.

    Raises:
        OutputError: there are fewer.
    """
    if needed > (free := free_disk(place)):
        raise OutputError(
            where,
            f"has {gib(free)} of free disk space",
            f"{what} needs {gib(needed)}",
            "Free some space, or choose another disk.",
        )


def free_disk(place: Path) -> int:
    """Return the bytes that are free where something will be."""
    return shutil.disk_usage(next(path for path in place.parents if path.exists())).free


def _written_bytes(weights: ModelWeights, precision: Precision) -> int:
    """Return how much the weights of a variant take at most."""
    count = weights.total_bytes // 4
    if not SPECS[precision].calibrated:
        return count * int(onnx_dtype(precision).itemsize)
    vocabulary = math.prod(weights.shape(EMBEDDING_TABLE) or (0,))  # in INT8 it is there twice
    if precision is Precision.FP8 and not weights.tied:
        vocabulary *= 2  # in FP16, as is a projection of its own
    return int(2.1 * vocabulary + _DECODER_BYTES[precision] * (count - vocabulary))
