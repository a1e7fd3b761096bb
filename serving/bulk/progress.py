"""How far a job is: a bar on a terminal, else a line now and then, as a log wants it."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_SECONDS = 30


@contextmanager
def progress(total: int, *, done: int) -> Iterator[Callable[[int], object]]:
    """Yield a function that is told how many more rows are done.

    Args:
        total: rows of the job.
        done: rows that were done before, which do not count in the speed.
    """
    if sys.stderr.isatty():
        with tqdm(total=total, initial=done, unit="row") as bar:
            yield bar.update
        return
    begun = said = time.monotonic()
    now = done

    def advance(rows: int) -> None:
        nonlocal now, said
        now += rows
        if (moment := time.monotonic()) - said >= LINE_SECONDS:
            said = moment
            logger.info(progress_line(now, total, (now - done) / (moment - begun)))

    yield advance


def progress_line(done: int, total: int, speed: float) -> str:
    """Return a line such as ``4,096 of 20,000 rows, 33.1 rows/s, 08:00 left``."""
    left = tqdm.format_interval((total - done) / speed)
    return f"{done:,} of {total:,} rows, {speed:.1f} rows/s, {left} left"
