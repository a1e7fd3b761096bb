"""What a bundle is opened with: the keyword arguments of ``Embedder``, and how a pickle opens it again."""

from collections.abc import Callable
from typing import TypedDict, TypeVar

from gircse.runtime.errors import sentence

Opened = TypeVar("Opened")


class OpenArguments(TypedDict, total=False):
    """The keyword arguments of ``Embedder``, for what passes them on; all of them fit into JSON."""

    precision: str | None
    provider: str
    layout: str | None
    threads: int | None
    streams: int
    verify: bool
    prefix_cache: bool | None


def reopen_arguments(
    kind: type[Opened], path: str, arguments: OpenArguments | None
) -> tuple[type[Opened], str, OpenArguments]:
    """Return what a pickle holds.

    Raises:
        TypeError: there are no arguments: the session was opened by somebody else.
    """
    if arguments is None:
        raise TypeError(sentence("embedder", "cannot be pickled", "it was made from an open session, not from a path"))
    return kind, path, arguments


def reopen(kind: Callable[..., Opened], path: str, arguments: OpenArguments) -> Opened:
    """Open a bundle as a pickle says."""
    return kind(path, **arguments)
