"""One process that turns fragments into files of vectors."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gircse.runtime import BundleError, Embedder, OutputError
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import reason_of
from gircse.runtime.numerics import Float32
from gircse.runtime.open_arguments import OpenArguments
from gircse.serving.bulk.job import REJECTED, VECTORS, Columns, Fragment, IdType, Recipe, VectorType
from gircse.serving.bulk.rows import MAX_CONTENT, Rejected, Rows, read_rows
from gircse.serving.bulk.storage import Place, locate

INT8_LARGEST = 127

OnOpen = Callable[[Recipe], None]
"""Is told what a worker runs before it gets a fragment; raises to refuse it."""


class Task(NamedTuple):
    """What a worker has to know; it travels to other machines.

    Attributes:
        bundle: directory of the bundle, there too.
        arguments: what the bundle is opened with.
        recipe: what the vectors have to be; its precision and provider are not looked at.
        columns: of the inputs.
        id_type: of the ids.
        output: name of the output directory.
        batch_size: as in ``Embedder.encode``.
        batch_tokens: as in ``Embedder.encode``.
    """

    bundle: str
    arguments: OpenArguments
    recipe: Recipe
    columns: Columns
    id_type: IdType
    output: str
    batch_size: int
    batch_tokens: int


class FragmentReport(NamedTuple):
    """What became of the rows of a fragment.

    Attributes:
        rows: of the input, blank lines included.
        embedded: have a vector.
        truncated: of these, were too long.
        rejected: have none.
    """

    rows: int
    embedded: int
    truncated: int
    rejected: int


class Worker:
    """Embeds fragments with a bundle that it opens once."""

    def __init__(self, task: Task) -> None:
        """Take the task; ``open`` does the rest."""
        self._task = task

    def open(self) -> Recipe:
        """Open the bundle, test it, and return the recipe with what it runs.

        Raises:
            BundleError: the bundle cannot be used, is not that of the task, or fails its self-test.
            ProviderError: the provider is not installed or cannot run the bundle.
            OptionError: an argument of the bundle or of the vectors is out of range.
        """
        task = self._task
        if (found := Bundle.open(task.bundle).manifest_sha256()) != task.recipe.bundle:
            raise BundleError(
                task.bundle, f"has the manifest {found[:12]} here", f"the job's is {task.recipe.bundle[:12]}"
            )
        self._embedder = Embedder(task.bundle, **task.arguments)
        if self._embedder.manifest.golden:
            report = self._embedder.self_test()
            if not report.passed:
                raise BundleError(
                    task.bundle, f"failed its self-test: smallest cosine to PyTorch {report.min_cosine:.7f}"
                )
        self._embedder.encode_iter(  # refuses a wrong argument before there is a job
            (),
            instruction=task.recipe.instruction,
            steps=task.recipe.steps,
            batch_size=task.batch_size,
            batch_tokens=task.batch_tokens,
        )
        self._recipe = msgspec.structs.replace(
            task.recipe, precision=self._embedder.precision, provider=self._embedder.provider.value
        )
        return self._recipe

    def run(self, fragment: Fragment) -> FragmentReport:
        """Embed a fragment and write its vectors and its rejected rows, these first: vectors mean that it is done.

        Raises:
            TextFileError: the input cannot be read.
            OutputError: the output cannot be written.
        """
        task = self._task
        rows = read_rows(fragment, task.columns, task.id_type)
        vectors, truncated = self._embed(rows.texts)
        finite = np.asarray(np.isfinite(vectors).all(axis=1))
        lost = [_overflowed(fragment, rows, at) for at in np.flatnonzero(~finite).tolist()]
        ids = [row_id for row_id, kept in zip(rows.ids, finite, strict=True) if kept]
        table = vector_table(ids, vectors[finite], truncated[finite], self._recipe, task.id_type)
        rejected = sorted([*rows.rejected, *lost], key=lambda row: row.row)
        output = locate(task.output)
        try:
            if rejected:
                (output / f"{REJECTED}/{fragment.name}.jsonl").write(_json_lines(rejected))
            (output / f"{VECTORS}/{fragment.name}.parquet").write(_parquet(table))
        except OSError as err:
            raise cannot_write(output, err) from err
        return FragmentReport(fragment.rows, len(ids), int(truncated[finite].sum()), len(rejected))

    def _embed(self, texts: list[str]) -> tuple[Float32, np.ndarray]:
        """Return the vectors (texts, hidden) float32 and which texts were cut (texts,) bool."""
        recipe, embedder = self._task.recipe, self._embedder
        token_ids, cut = embedder.tokenizer.tokenize(texts, instruction=recipe.instruction)
        vectors = np.empty((len(texts), embedder.embedding_dimension), np.float32)
        truncated = np.zeros(len(texts), bool)
        truncated[cut] = True
        batches = embedder.run_batches(
            token_ids,
            steps=recipe.steps,
            batch_size=self._task.batch_size,
            batch_tokens=self._task.batch_tokens,
            instruction_tokens=embedder.tokenizer.instruction_tokens(token_ids, instruction=recipe.instruction),
        )
        for positions, outputs in batches:
            vectors[list(positions)] = outputs.embedding
        return vectors, truncated


def run_here(task: Task, fragments: Sequence[Fragment], on_open: OnOpen) -> Iterator[FragmentReport]:
    """Do the fragments in this process, one after the other; yields a report for each.

    Raises:
        GircseError: as ``Worker`` does.
    """
    worker = Worker(task)
    on_open(worker.open())
    yield from map(worker.run, fragments)


def vector_table(
    ids: list[int | str], vectors: Float32, truncated: np.ndarray, recipe: Recipe, id_type: IdType
) -> pa.Table:
    """Return a fragment as it is written: ``id``, ``vector``, ``truncated``, and for INT8 ``scale``.

    INT8 numbers of a vector have one scale: vector = scale * numbers, and its largest number is 127 or -127.

    Args:
        ids: of the rows.
        vectors: (rows, hidden) float32.
        truncated: (rows,) bool.
        recipe: goes into the metadata; the same in all fragments of a job.
        id_type: of the ids.
    """
    columns = {"id": pa.array(ids, pa.int64() if id_type is IdType.INTEGER else pa.string())}
    numbers, scale = vectors, None
    if recipe.vector_type is VectorType.FLOAT16:
        numbers = vectors.astype(np.float16)
    elif recipe.vector_type is VectorType.INT8:
        scale = np.abs(vectors).max(axis=1, initial=0) / INT8_LARGEST
        numbers = np.rint(vectors / scale[:, None]).astype(np.int8)
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), vectors.shape[1])
    if scale is not None:
        columns["scale"] = pa.array(scale.astype(np.float32))
    columns["truncated"] = pa.array(truncated)
    return pa.table(columns, metadata={b"gircse": msgspec.json.encode(recipe)})


def cannot_write(output: Place, err: OSError) -> OutputError:
    """Return what is said of an output that could not be written."""
    hint = "Check its directory and the free space; the same command goes on with what is missing."
    return OutputError(f"--output {output.name}", f"cannot be written: {err.strerror or reason_of(err)}", None, hint)


def _overflowed(fragment: Fragment, rows: Rows, at: int) -> Rejected:
    reason = "its vector is not finite: the numbers of this precision are too small for it"
    return Rejected(fragment.input, rows.numbers[at], reason, rows.texts[at][:MAX_CONTENT])


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, use_dictionary=False)  # no two vectors are alike
    return buffer.getvalue()


def _json_lines(rows: list[Rejected]) -> bytes:
    return b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
