"""What the JSON files of the toolkit are made of: typed, immutable records with a schema version."""

from typing import TypeVar

import msgspec

from gircse.runtime.errors import GircseError

R = TypeVar("R", bound=msgspec.Struct)

UNREADABLE_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What ``msgspec`` raises for a file that is no JSON, is not of the type, or is nested too deeply."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every record: no field that the schema lacks, no change after it was made."""


class _Version(msgspec.Struct):
    """The one field that every version of every file has."""

    schema_version: int


def encode_record(record: msgspec.Struct, *, indent: int) -> bytes:
    """Return a record as the content of a JSON file; ``indent`` as in ``msgspec.json.format``."""
    return msgspec.json.format(msgspec.json.encode(record), indent=indent) + b"\n"


def decode_versioned(
    kind: type[R],
    content: bytes,
    *,
    where: str,
    oldest: int,
    newest: int,
    error: type[GircseError],
    remake: str,
    outdated: type[GircseError] | None = None,
) -> R:
    """Read a JSON file of a schema version that this code knows.

    Args:
        kind: the record that the file holds.
        content: of the file.
        where: the file, for errors.
        oldest: oldest schema version that ``kind`` can hold.
        newest: newest such version.
        error: class of what is raised.
        remake: how to make the file again, as a sentence.
        outdated: class of what is raised for a version before ``oldest``, where it is another.

    Raises:
        GircseError: of the class ``error``: not JSON, another schema version, or missing, unknown or ill-typed fields.
    """
    try:
        version = msgspec.json.decode(content, type=_Version).schema_version
        if version > newest:
            raise error(
                where,
                f"has schema version {version}",
                f"this gircse-deploy reads up to {newest}",
                "Upgrade: pip install -U gircse-deploy",
            )
        if version < oldest:
            readable = f"{oldest} to {newest}" if oldest < newest else f"version {newest}"
            raise (outdated or error)(
                where, f"has schema version {version}", f"this gircse-deploy reads {readable}", remake
            )
        return msgspec.json.decode(content, type=kind)
    except UNREADABLE_JSON as err:
        raise error(where, f"cannot be read: {err}", None, remake) from err
