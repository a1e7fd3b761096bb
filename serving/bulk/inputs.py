"""Inputs of a job: what they hold, read once and whole before anything is embedded."""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from hashlib import sha256

import numpy as np
import pyarrow as pa

from gircse.runtime import TextFileError
from gircse.serving.bulk.job import Columns, IdType, InputFile
from gircse.serving.bulk.rows import (
    BLOCK_BYTES,
    UnusableRowError,
    named_errors,
    open_lines,
    open_parquet,
    parse_line,
)
from gircse.serving.bulk.storage import Place

PROBED_LINES = 100
"""Lines of JSON of which one has to have the columns: with a wrong name, every row would be rejected."""


def inspect(place: Place, columns: Columns, fragment_rows: int, known: InputFile | None) -> InputFile:
    """Read an input and return what a job has to know of it.

    Args:
        place: of the file.
        columns: that it has to have.
        fragment_rows: rows of a fragment.
        known: what the job knew; the file is not read again where size and time are the same.

    Raises:
        TextFileError: the file cannot be read, or lacks a column.
    """
    info = place.info
    if known is not None and info.mtime_ns and (known.bytes, known.modified) == (info.size, info.mtime_ns):
        return known
    with named_errors(place.name):
        if place.name.endswith(".parquet"):
            digest, (rows, id_type) = _digest(place), _inspect_parquet(place, columns)
            return InputFile(info.size, info.mtime_ns, digest, rows, [], id_type)
        id_type = _probe_lines(place, columns)
        digest, rows, offsets = _scan_lines(place, fragment_rows)
        return InputFile(info.size, info.mtime_ns, digest, rows, offsets, id_type)


def common_id_type(inputs: Mapping[str, InputFile]) -> IdType:
    """Return the type of the ids of all inputs.

    Raises:
        TextFileError: they have several.
    """
    typed = {file.id_type: name for name, file in inputs.items() if file.id_type is not None}
    if len(typed) > 1:
        (one, a), (other, b) = typed.items()
        raise TextFileError(a, f"has ids of type {one}, and {b} of type {other}", None, "Convert one of them.")
    return next(iter(typed), IdType.STRING)


def _digest(place: Place) -> str:
    digest = sha256()
    with place.files.open_input_file(place.path) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _inspect_parquet(place: Place, columns: Columns) -> tuple[int, IdType | None]:
    """Return how many rows a file has, and the type of its ids."""
    with open_parquet(place) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    types = []
    for column in filter(None, (columns.text, columns.id)):
        if schema.names.count(column) != 1:
            raise _no_column(place, column, columns, schema.names)
        kind = schema.field(column).type
        types.append(_id_type(kind))
        allowed = [IdType.STRING] if column == columns.text else list(IdType)
        if types[-1] not in allowed:
            expected = " or ".join(allowed)
            raise TextFileError(f"{place.name}, column {column},", f"has type {kind}", f"{expected} is expected")
    return rows, types[-1] if columns.id else IdType.STRING


def _id_type(kind: pa.DataType) -> IdType | None:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind):
        return IdType.INTEGER
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return IdType.STRING if any(is_string(kind) for is_string in strings) else None


def _probe_lines(place: Place, columns: Columns) -> IdType | None:
    """Return the type of the first id, and refuse a file whose first rows all lack a column."""
    rows = []
    with open_lines(place, 0) as lines:
        for line in itertools.islice(filter(bytes.strip, lines), PROBED_LINES):
            with contextlib.suppress(UnusableRowError):
                rows.append(parse_line(line))
    for column in filter(None, (columns.text, columns.id)):
        if rows and not any(column in row for row in rows):
            raise _no_column(place, column, columns, sorted(set().union(*rows)))
    if columns.id is None:
        return IdType.STRING
    for row in rows:
        found = row.get(columns.id)
        if isinstance(found, str) or type(found) is int:
            return IdType.STRING if isinstance(found, str) else IdType.INTEGER
    return None


def _scan_lines(place: Place, fragment_rows: int) -> tuple[str, int, list[int]]:
    """Return the SHA-256 of the unpacked lines, how many there are, and where fragments begin."""
    digest, rows, size, offsets, last = sha256(), 0, 0, [0], b"\n"
    with open_lines(place, 0) as lines:
        while block := lines.read(BLOCK_BYTES):
            digest.update(block)
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            while (first := len(offsets) * fragment_rows) <= rows + len(ends):
                offsets.append(size + int(ends[first - rows - 1]) + 1)
            rows, size, last = rows + len(ends), size + len(block), block[-1:]
    rows += last != b"\n"
    return digest.hexdigest(), rows, offsets[: -(-rows // fragment_rows)]


def _no_column(place: Place, column: str, columns: Columns, names: Sequence[str]) -> TextFileError:
    flag = "--text-column" if column == columns.text else "--id-column"
    hint = f"Name it with {flag}" + (", or give --row-ids." if column == columns.id else ".")
    return TextFileError(place.name, f"has no column {column}", f"it has {', '.join(names)}", hint)
