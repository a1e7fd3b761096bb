"""The rows of a fragment, from Parquet or JSON Lines, and why some of them are rejected."""

import codecs
import contextlib
import functools
import io
import itertools
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from gircse.runtime import TextFileError
from gircse.runtime.errors import reason_of
from gircse.runtime.records import UNREADABLE_JSON, Record
from gircse.serving.bulk.job import Columns, Fragment, IdType
from gircse.serving.bulk.storage import Place, locate

BLOCK_BYTES = 1 << 22

MAX_CONTENT = 10_000
"""Characters of a rejected row that are kept."""

INT64 = range(-(1 << 63), 1 << 63)


class Rejected(Record, frozen=True):
    """A row that has no vector.

    Attributes:
        input: name of the file.
        row: its number there, from 0.
        reason: why.
        content: the row, or its text; what is no UTF-8 is escaped. None where there is none.
    """

    input: str
    row: int
    reason: str
    content: str | None


class Rows(NamedTuple):
    """Rows of a fragment.

    Attributes:
        numbers: of the rows that can be embedded.
        ids: of the same.
        texts: of the same.
        rejected: the other rows.
    """

    numbers: list[int]
    ids: list[int | str]
    texts: list[str]
    rejected: list[Rejected]


class UnusableRowError(Exception):
    """Why a row is rejected."""


def read_rows(fragment: Fragment, columns: Columns, id_type: IdType) -> Rows:
    """Read the rows of a fragment. Blank lines of JSON are left out; a row that has no text or no id is rejected.

    Raises:
        TextFileError: the file cannot be read.
    """
    rows = Rows([], [], [], [])
    with named_errors(f"{fragment.input}, rows {fragment.first} to {fragment.first + fragment.rows - 1},"):
        for row in _raw_rows(fragment, columns):
            try:
                values = parse_line(row.content or b"") if row.values is None else row.values
                text = _text_of(values, columns.text)
                row_id = fragment.row_id(row.number) if columns.id is None else _id_of(values, columns.id, id_type)
            except UnusableRowError as err:
                rows.rejected.append(Rejected(fragment.input, row.number, str(err), _shown(row.content)))
            else:
                rows.numbers.append(row.number)
                rows.ids.append(row_id)
                rows.texts.append(text)
    return rows


class _RawRow(NamedTuple):
    """A row as it stands in the file: of JSON Lines the line, of Parquet the text and the columns."""

    number: int
    content: bytes | None
    values: dict[str, Any] | None


def _raw_rows(fragment: Fragment, columns: Columns) -> Iterator[_RawRow]:
    info = locate(fragment.input).info
    if (info.size, info.mtime_ns) != (fragment.bytes, fragment.modified):
        raise TextFileError(fragment.input, "has changed while it was read", None, "Take another --output.")
    if fragment.input.endswith(".parquet"):
        yield from _parquet_rows(fragment, columns)
        return
    with open_lines(locate(fragment.input), fragment.offset) as lines:
        for number, line in enumerate(itertools.islice(lines, fragment.rows), start=fragment.first):
            if line.strip():
                yield _RawRow(number, line.rstrip(b"\r\n"), None)


def _parquet_rows(fragment: Fragment, columns: Columns) -> Iterator[_RawRow]:
    wanted = tuple(dict.fromkeys(filter(None, (columns.text, columns.id))))
    begin, end, group_begin = fragment.first, fragment.first + fragment.rows, 0
    for group, rows in enumerate(_group_rows(fragment.input)):
        inside = range(max(begin, group_begin), min(end, group_begin + rows))
        if inside:
            table = _row_group(fragment.input, (fragment.bytes, fragment.modified), group, wanted)
            part = table.slice(inside.start - group_begin, len(inside))
            values = [_values_of(part.column(name)) for name in wanted]
            for number, row in zip(inside, zip(*values, strict=True), strict=True):
                yield _RawRow(number, row[0], dict(zip(wanted, row, strict=True)))
        group_begin += rows


def _group_rows(name: str) -> list[int]:
    with open_parquet(locate(name)) as file:
        return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


@functools.lru_cache(maxsize=1)  # many fragments lie in one row group, and are read one after the other
def _row_group(name: str, version: tuple[int, int | None], group: int, columns: tuple[str, ...]) -> pa.Table:
    """Read columns of a row group; ``version`` tells what was read from a file that has been replaced since."""
    with open_parquet(locate(name)) as file:
        return file.read_row_group(group, columns=list(columns))


def _values_of(column: pa.ChunkedArray) -> list[Any]:
    """Return numbers as int and strings as bytes, because a file may hold what is no UTF-8."""
    if pa.types.is_integer(column.type):
        values: list[Any] = column.to_pylist()
        return values
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values = column.cast(pa.large_binary()).to_pylist()
    return values


def parse_line(line: bytes) -> dict[str, Any]:
    """Return what a line of JSON holds.

    Raises:
        UnusableRowError: it is no JSON object.
    """
    try:
        values = msgspec.json.decode(line.removeprefix(codecs.BOM_UTF8))
    except UNREADABLE_JSON as err:
        raise UnusableRowError(f"is no JSON: {reason_of(err)}") from err
    if not isinstance(values, dict):
        raise UnusableRowError("is no JSON object")
    return values


def _text_of(values: dict[str, Any], column: str) -> str:
    text = _string(_value_of(values, column), column)
    if not isinstance(text, str):
        raise UnusableRowError(f"{column} is no string")
    return text


def _id_of(values: dict[str, Any], column: str, kind: IdType) -> int | str:
    found = _string(_value_of(values, column), column)
    fits: bool = isinstance(found, str) if kind is IdType.STRING else type(found) is int and found in INT64
    if not fits:
        expected = "a string" if kind is IdType.STRING else "a 64-bit integer"
        raise UnusableRowError(f"{column} is not {expected}, as the ids of this job are")
    given: int | str = found
    return given


def _value_of(values: dict[str, Any], column: str) -> Any:
    """Return what a row has in a column.

    Raises:
        UnusableRowError: there is nothing.
    """
    if values.get(column) is None:
        raise UnusableRowError(f"{column} is {'null' if column in values else 'missing'}")
    return values[column]


def _string(value: Any, column: str) -> Any:
    """Decode what Parquet has as bytes."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as err:
        raise UnusableRowError(f"{column} is not UTF-8: {err.reason} at byte {err.start}") from err


def _shown(content: bytes | None) -> str | None:
    return None if content is None else content.decode("utf-8", "backslashreplace")[:MAX_CONTENT]


@contextlib.contextmanager
def open_lines(place: Place, offset: int) -> Iterator[BinaryIO]:
    """Open JSON Lines for reading, unpacked, so many bytes after their beginning."""
    packed = not place.name.endswith(".jsonl")
    with place.files.open_input_stream(place.path) if packed else place.files.open_input_file(place.path) as raw:
        if packed:
            while offset > 0:
                offset -= len(raw.read(min(offset, BLOCK_BYTES)))
        else:
            raw.seek(offset)
        yield io.BufferedReader(raw, BLOCK_BYTES)


@contextlib.contextmanager
def open_parquet(place: Place) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for reading."""
    with place.files.open_input_file(place.path) as raw:
        yield pq.ParquetFile(raw)


@contextlib.contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Turn whatever reading and unpacking raise into an error that names the file.

    Raises:
        TextFileError: the file cannot be read.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as err:
        raise TextFileError(where, f"cannot be read: {reason_of(err)}", None, "Check the file.") from err
