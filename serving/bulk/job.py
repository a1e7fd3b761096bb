"""What a job of ``gircse-bulk`` is: its inputs, cut into fragments, and all that its vectors depend on.

It stands in ``job.json`` beside the vectors, so that another run goes on with the same or is refused.
"""

import re
from collections.abc import Iterator
from enum import StrEnum
from hashlib import sha256
from typing import NamedTuple

import msgspec
from pyarrow.fs import FileType

from gircse.runtime import OptionError, OutputError
from gircse.runtime.records import Record, decode_versioned, encode_record
from gircse.serving.bulk.storage import Place

SCHEMA_VERSION = 1

JOB_NAME = "job.json"
VECTORS, REJECTED = "vectors", "rejected"


class VectorType(StrEnum):
    """Type of the numbers of a vector that is written."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"


class IdType(StrEnum):
    """Type of the ids of a job's rows."""

    INTEGER = "int64"
    STRING = "string"


class Columns(Record, frozen=True):
    """Where an input has what is read.

    Attributes:
        text: column of the texts.
        id: column of the ids; None makes them of the input's label and the number of the row.
    """

    text: str
    id: str | None


class Recipe(Record, frozen=True):
    """What the vectors of a job depend on, besides the texts.

    Attributes:
        bundle: SHA-256 of the bundle's manifest, which has those of all other files.
        precision: variant that runs; None until a worker has opened the bundle.
        provider: where it runs; None until then.
        steps: refinement steps.
        instruction: put before every text.
        vector_type: type of the numbers.
    """

    bundle: str
    precision: str | None
    provider: str | None
    steps: int
    instruction: str
    vector_type: VectorType


class InputFile(Record, frozen=True):
    """What a job knows of an input.

    Attributes:
        bytes: its size.
        modified: when it was written, in nanoseconds; None where its file system does not say.
        sha256: of its content; that of JSON Lines is taken unpacked.
        rows: how many it has; in JSON Lines, blank lines count.
        offsets: bytes before the first line of each fragment, unpacked; empty for Parquet.
        id_type: of its ids; None where no row has one.
    """

    bytes: int
    modified: int | None
    sha256: str
    rows: int
    offsets: list[int]
    id_type: IdType | None


class Job(Record, frozen=True):
    """The content of ``job.json``.

    Attributes:
        columns: of all inputs.
        fragment_rows: rows of a fragment; the last one of an input has fewer.
        recipe: of all vectors.
        id_type: of all ids.
        inputs: by name.
        schema_version: of this file.
    """

    columns: Columns
    fragment_rows: int
    recipe: Recipe
    id_type: IdType
    inputs: dict[str, InputFile]
    schema_version: int = SCHEMA_VERSION

    def fragments(self, name: str) -> "Iterator[Fragment]":
        """Yield the fragments of an input."""
        known = self.inputs[name]
        for number, first in enumerate(range(0, known.rows, self.fragment_rows)):
            rows = min(self.fragment_rows, known.rows - first)
            offset = known.offsets[number] if known.offsets else 0
            yield Fragment(name, first, rows, offset, known.bytes, known.modified)


class Fragment(NamedTuple):
    """Rows of an input that are embedded and written together.

    Attributes:
        input: name of the input.
        first: number of its first row, from 0.
        rows: how many rows.
        offset: bytes of JSON Lines before it, unpacked.
        bytes: size of the input.
        modified: when it was written, in nanoseconds; None where its file system does not say.
    """

    input: str
    first: int
    rows: int
    offset: int
    bytes: int
    modified: int | None

    @property
    def label(self) -> str:
        """Part of file names and ids that stands for the input; a hash tells files of one name apart."""
        stem = re.sub(r"[^\w.-]+", "_", self.input.rsplit("/", 1)[-1].split(".")[0], flags=re.ASCII)[:60]
        return f"{stem}-{sha256(self.input.encode()).hexdigest()[:8]}"

    @property
    def name(self) -> str:
        """Name of what is made of it, without an ending."""
        return f"{self.label}-{self.first:010d}-{self.first + self.rows:010d}"

    def row_id(self, row: int) -> str:
        """Return the id of a row in a job without an id column."""
        return f"{self.label}-{row:010d}"


def read_job(output: Place) -> Job | None:
    """Return the job that an output directory belongs to, or None for a new one.

    Raises:
        OutputError: something else stands there, or the job cannot be read.
    """
    if output.info.type is FileType.File:
        raise OutputError(f"--output {output.name}", "is a file", "a directory is expected", "Take another.")
    names = {name for name, _ in output.children()}
    if JOB_NAME not in names:
        if any(not name.startswith(".") for name in names):  # what a killed run left
            raise OutputError(f"--output {output.name}", f"is not empty and has no {JOB_NAME}", None, "Take another.")
        return None
    return decode_versioned(
        Job,
        (output / JOB_NAME).read(),
        where=(output / JOB_NAME).name,
        oldest=SCHEMA_VERSION,
        newest=SCHEMA_VERSION,
        error=OutputError,
        remake="Take another --output.",
    )


def write_job(output: Place, job: Job) -> None:
    """Make the output directory and write the job into it.

    Raises:
        OSError: it cannot be written.
    """
    output.files.create_dir(output.path, recursive=True)
    (output / JOB_NAME).write(encode_record(job, indent=1))
    for folder in (VECTORS, REJECTED):
        output.files.create_dir((output / folder).path)


def check_same(output: Place, before: Job, now: Job) -> None:
    """Refuse to go on with a job whose vectors would be others.

    What only a worker can tell, the precision and the provider, counts as the same until it is known.

    Raises:
        OptionError: a setting or an input has changed; all changed settings are named.
    """
    old, new = _settings(before), _settings(now)
    changed = [f"{name} was {old[name]!r} and is {new[name]!r}" for name in old if new[name] not in (None, old[name])]
    if changed:
        raise OptionError(
            f"--output {output.name}",
            f"holds vectors of another job: {'; '.join(changed)}",
            None,
            "Go on as before, or take another --output.",
        )
    for name, known in before.inputs.items():
        found = now.inputs.get(name, known)
        if found.sha256 != known.sha256:
            raise OptionError(
                name,
                f"has changed since {output.name} was begun: {known.rows:,} rows then, {found.rows:,} now"
                f" (SHA-256 {known.sha256[:12]}, {found.sha256[:12]})",
                None,
                "Take another --output, or give the file another name.",
            )


def _settings(job: Job) -> dict[str, object]:
    built = msgspec.to_builtins(job)
    columns = {"--text-column": job.columns.text, "--id-column": job.columns.id or "(made of row numbers)"}
    return {
        **columns,
        "the type of the ids": built["id_type"],
        "--fragment-rows": job.fragment_rows,
        "the bundle": job.recipe.bundle[:12],
        **{name.replace("_", " "): value for name, value in built["recipe"].items() if name != "bundle"},
    }
