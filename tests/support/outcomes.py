"""What may come of a damaged file: a result, or one clear error."""

from collections.abc import Callable
from typing import TypeVar

from gircse.runtime.errors import GircseError

T = TypeVar("T")

LONGEST_MESSAGE = 10_000


def result_or_error(work: Callable[[], T]) -> T | None:
    """Return the result of the work, or None after one clear error; any other exception is the test's failure."""
    try:
        return work()
    except GircseError as err:
        message = str(err)
        assert message.isprintable()
        assert len(message) < LONGEST_MESSAGE
        return None
