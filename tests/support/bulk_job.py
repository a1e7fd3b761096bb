"""Inputs for ``gircse-bulk``, and what it wrote."""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

COMMAND = [sys.executable, "-m", "gircse.serving.bulk.bulk_command"]


def text_of(number: int) -> str:
    return " ".join(["a small bird"] * (number % 5 + 1)) + f" sings {number}"


def write_lines(path: Path, numbers: Iterable[int], *, bad: Sequence[bytes] = ()) -> Path:
    """Write JSON Lines, the bad ones first."""
    lines = [json.dumps({"id": number, "text": text_of(number)}).encode() for number in numbers]
    path.write_bytes(b"".join(line + b"\n" for line in [*bad, *lines]))
    return path


def write_parquet(path: Path, columns: dict[str, Any], *, group: int = 1000) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def vectors_of(output: Path) -> dict[Any, np.ndarray]:
    """Return the vectors by id, as they were written; an id that stands twice is an error."""
    table = pyarrow.dataset.dataset(output / "vectors").to_table()
    ids = table["id"].to_pylist()
    assert len(set(ids)) == len(ids)
    vectors = [np.array(vector, np.float32) for vector in table["vector"].to_pylist()]
    if "scale" in table.column_names:
        vectors = [vector * scale for vector, scale in zip(vectors, table["scale"].to_pylist(), strict=True)]
    return dict(zip(ids, vectors, strict=True))


def rejected_of(output: Path) -> list[dict[str, Any]]:
    files = sorted((output / "rejected").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


def start(*arguments: Any, **options: Any) -> "subprocess.Popen[str]":
    """Start the command as a process."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
