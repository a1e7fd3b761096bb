"""A run of ``gircse-bulk``: what is there, what is missing, and who does it."""

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
from pyarrow.fs import FileType

from gircse.runtime import OptionError
from gircse.runtime.bundle import Bundle
from gircse.runtime.command import check_at_least_one, open_arguments
from gircse.runtime.precision import CPU_ORDER
from gircse.runtime.provider import Provider
from gircse.serving.bulk.inputs import common_id_type, inspect
from gircse.serving.bulk.job import (
    REJECTED,
    VECTORS,
    Columns,
    Fragment,
    Job,
    Recipe,
    VectorType,
    check_same,
    read_job,
    write_job,
)
from gircse.serving.bulk.progress import progress
from gircse.serving.bulk.storage import Place, find_inputs, locate
from gircse.serving.bulk.worker import FragmentReport, OnOpen, Task, cannot_write, run_here

logger = logging.getLogger(__name__)


def run_bulk(args: argparse.Namespace) -> str:
    """Do what is missing of a job and return what was done, in a sentence; ``args`` are those of the command.

    Raises:
        GircseError: the inputs, the output or the bundle cannot be used, or the output is of another job.
    """
    workers = _workers(args)
    bundle, output = Bundle.open(args.bundle), locate(args.output)
    before = read_job(output)
    own = f"{output.name}/"  # a directory of inputs may have the output in it
    places = [place for place in find_inputs(args.inputs) if not place.name.startswith(own)]
    known = before.inputs if before else {}
    columns = Columns(args.text_column, None if args.row_ids else args.id_column or "id")
    inputs = known | {
        place.name: inspect(place, columns, args.fragment_rows, known.get(place.name)) for place in places
    }
    recipe = Recipe(
        bundle=bundle.manifest_sha256(),
        precision=args.precision,
        provider=None if args.provider is Provider.AUTO else args.provider.value,
        steps=bundle.manifest.graph.steps if args.steps is None else args.steps,
        instruction=args.instruction,
        vector_type=VectorType(args.vector_type),
    )
    job = Job(columns, args.fragment_rows, recipe, common_id_type(inputs), inputs)
    if before is not None:
        check_same(output, before, job)
    fragments = [fragment for place in places for fragment in job.fragments(place.name)]
    _delete_scratch(output)
    missing = _missing(output, fragments)
    task = Task(
        bundle=str(bundle.directory),
        arguments=open_arguments(args),
        recipe=recipe,
        columns=columns,
        id_type=job.id_type,
        output=output.name,
        batch_size=args.batch_size,
        batch_tokens=args.batch_tokens,
    )
    begun = time.monotonic()
    rows = sum(fragment.rows for fragment in fragments)
    done = rows - sum(fragment.rows for fragment in missing)
    total = FragmentReport(0, 0, 0, 0)
    if missing:
        with (
            _reports(args, bundle, task, missing, _Opening(output, before, job), workers=workers) as reports,
            progress(rows, done=done) as advance,
        ):
            for report in reports:
                total = FragmentReport(*map(sum, zip(total, report, strict=True)))
                advance(report.rows)
        _delete_scratch(output)
    return _summary(output, total, done=done, seconds=time.monotonic() - begun)


class _Opening:
    """Settles the job with the first worker that has opened the bundle, and compares the others with it."""

    def __init__(self, output: Place, before: Job | None, job: Job) -> None:
        self._output, self._settled, self._job = output, before, job
        self._written = False

    def __call__(self, recipe: Recipe) -> None:
        job = msgspec.structs.replace(self._job, recipe=recipe)
        if self._settled is not None:
            check_same(self._output, self._settled, job)
        if self._written:
            return
        try:
            write_job(self._output, job)
        except OSError as err:
            raise cannot_write(self._output, err) from err
        self._settled, self._written = job, True


def _workers(args: argparse.Namespace) -> int | None:
    """Check the flags that are numbers or that exclude each other; returns the number of workers, None for auto."""
    if args.row_ids and args.id_column:
        raise OptionError("--row-ids", "is given with --id-column", None, "Give one of them.")
    check_at_least_one(args, "fragment_rows", "streams", "threads")
    if args.workers == "auto":
        return None
    if not args.workers.isdecimal() or int(args.workers) < 1:
        raise OptionError("--workers", f"is {args.workers}", "a number from 1 on, or auto")
    return int(args.workers)


def _cores(args: argparse.Namespace) -> int | None:
    """Return how many cores a worker uses; None for as many as there are."""
    threads: int | None = args.threads
    return threads if args.streams == 1 else (threads or 1) * int(args.streams)


def _missing(output: Place, fragments: Sequence[Fragment]) -> list[Fragment]:
    """Return the fragments that have no vectors yet."""
    there = {name for name, _ in (output / VECTORS).children()}
    return [fragment for fragment in fragments if f"{fragment.name}.parquet" not in there]


def _delete_scratch(output: Place) -> None:
    """Delete what a run or a worker that was killed left of files that it was writing."""
    for folder in (VECTORS, REJECTED):
        for name, info in (output / folder).children():
            if name.startswith(".") and info.type is FileType.File:
                output.files.delete_file(info.path)


@contextmanager
def _reports(
    args: argparse.Namespace,
    bundle: Bundle,
    task: Task,
    missing: Sequence[Fragment],
    opening: OnOpen,
    *,
    workers: int | None,
) -> Iterator[Iterator[FragmentReport]]:
    """Yield the reports of the missing fragments as they come, from this process or from workers on Ray."""
    if workers == 1 and args.ray_address is None:
        yield run_here(task, missing, opening)
        return
    from gircse.serving.bulk.ray_pool import connected, divide, run_on_ray

    variant = bundle.variant(args.precision or bundle.default_precision(CPU_ORDER))
    size = sum(bundle.manifest.files[name].bytes for name in variant.files)
    gpu = None if args.provider is Provider.AUTO else args.provider is not Provider.CPU
    with connected(args.ray_address):
        share = divide(workers=workers, threads=_cores(args), gpu=gpu, weight_bytes=size)
        threads = None if share.gpus else share.cpus // args.streams
        task = task._replace(arguments={**task.arguments, "threads": threads})
        logger.info("workers: %d; CPUs of each: %d", share.workers, share.cpus)
        yield run_on_ray(task, missing, opening, share)


def _summary(output: Place, total: FragmentReport, *, done: int, seconds: float) -> str:
    parts = [f"{output.name}/{VECTORS}: {total.embedded:,} vectors of {total.rows:,} rows in {seconds:.0f} s"]
    if done:
        parts.append(f"{done:,} rows were done before")
    if total.truncated:
        parts.append(f"{total.truncated:,} of the texts were too long and were cut")
    if total.rejected:
        parts.append(f"{total.rejected:,} of the rows were rejected, see {output.name}/{REJECTED}")
    return "; ".join(parts)
