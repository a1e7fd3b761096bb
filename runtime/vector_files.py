"""Vectors to files as they come, in flat memory: ``.npy`` arrays and JSON lines."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from gircse.runtime.numerics import Float32


def write_npy(file: BinaryIO, windows: Iterable[Float32], *, dimension: int) -> None:
    """Write the rows of all windows as one array, with the bytes that ``np.save`` would write.

    The header holds the number of rows and comes first. numpy pads it to the same length for every number, so it is
    written twice: with no rows, and again in its place when the number is known.

    Args:
        file: empty, seekable, opened in binary mode.
        windows: (n_i, dimension) float32 each.
        dimension: length of a row; there may be no windows to tell.
    """
    _write_header(file, (0, dimension))
    start, rows = file.tell(), 0
    for vectors in windows:
        file.write(np.ascontiguousarray(vectors, np.float32).data)
        rows += len(vectors)
    file.seek(0)
    _write_header(file, (rows, dimension))
    if file.tell() != start:
        raise ValueError("numpy wrote a header of another length, over the first row")


def json_lines(texts: Sequence[str], vectors: Float32) -> Iterator[str]:
    """Yield a line of JSON for each text: ``{"text": ..., "embedding": [...]}``."""
    for text, vector in zip(texts, vectors, strict=True):
        yield json.dumps({"text": text, "embedding": vector.tolist()}, ensure_ascii=False) + "\n"


def _write_header(file: BinaryIO, shape: tuple[int, int]) -> None:
    descr = np.lib.format.dtype_to_descr(np.dtype(np.float32))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
