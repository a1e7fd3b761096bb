"""Files on this machine and in object stores, by pyarrow's file systems."""

import fnmatch
import logging
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyarrow import ArrowInvalid
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from gircse.runtime import OptionError, TextFileError
from gircse.runtime.atomic_file import atomic_write
from gircse.runtime.errors import reason_of

logger = logging.getLogger(__name__)

READABLE = re.compile(r"\.(parquet|jsonl(\.(gz|bz2|zst))?)$")


@dataclass(frozen=True)
class Place:
    """A file or a directory.

    Attributes:
        name: an absolute path, or a URI such as ``s3://bucket/texts``.
        files: its file system.
        path: where it is there.
    """

    name: str
    files: FileSystem
    path: str

    def __truediv__(self, relative: str) -> "Place":
        return Place(f"{self.name.rstrip('/')}/{relative}", self.files, f"{self.path.rstrip('/')}/{relative}")

    @property
    def info(self) -> FileInfo:
        """What the file system says of it."""
        return self.files.get_file_info(self.path)

    def children(self, *, recursive: bool = False) -> Iterator[tuple[str, FileInfo]]:
        """Yield the relative paths of what is inside; nothing where there is no such directory."""
        selector = FileSelector(self.path, recursive=recursive, allow_not_found=True)
        for info in self.files.get_file_info(selector):
            yield info.path[len(self.path.rstrip("/")) + 1 :], info

    def read(self) -> bytes:
        """Return the content of a file."""
        with self.files.open_input_file(self.path) as file:
            content: bytes = file.read()
        return content

    def write(self, content: bytes) -> None:
        """Write a file whole or not at all, whatever happens meanwhile, a power failure included."""
        if isinstance(self.files, LocalFileSystem):
            with atomic_write(Path(self.path)) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            return
        folder, _, name = self.path.rpartition("/")
        scratch = f"{folder}/.{name}.{secrets.token_hex(8)}"
        # Not to its own name: closing a stream that has failed publishes what came before in an object store.
        with self.files.open_output_stream(scratch) as stream:
            stream.write(content)
        self.files.move(scratch, self.path)


def locate(name: str) -> Place:
    """Return the place of a path or a URI.

    Raises:
        OptionError: there is no such file system.
    """
    if "://" not in name:
        path = os.path.abspath(name)
        return Place(path, LocalFileSystem(), path)
    name = name.rstrip("/")
    try:
        files, path = FileSystem.from_uri(name)
    except (ArrowInvalid, NotImplementedError, OSError) as err:
        raise OptionError(
            name, f"cannot be used: {reason_of(err)}", None, "Take a path, or a URI that pyarrow knows."
        ) from err
    return Place(name, files, path)


def find_inputs(names: Sequence[str]) -> list[Place]:
    """Return the files that names, globs and directories stand for, each of them once, in a fixed order.

    A directory stands for what can be read in it, at any depth, but for names that begin with a dot or an underscore.

    Raises:
        OptionError: there is no such file system.
        TextFileError: nothing is found, or a file is neither Parquet nor JSON Lines.
    """
    found: dict[str, Place] = {}
    for name in names:
        for place in _matches(name):
            if not READABLE.search(place.name):
                raise TextFileError(place.name, "cannot be read", "a name ends in .parquet, .jsonl or .jsonl.gz")
            found[place.name] = place
    return [found[name] for name in sorted(found)]


def _matches(name: str) -> list[Place]:
    wild = re.search(r"[*\[]" if "://" in name else r"[*?\[]", name)  # in a URI, options come after a ?
    if wild is None or ("://" not in name and Path(name).exists()):
        return _at(locate(name))
    end = name.rfind("/", 0, wild.start())  # the directory above the first part with a wildcard
    base, pattern = locate(name[:end] or "/") if end >= 0 else locate("."), name[end + 1 :].split("/")
    matching = [
        base / path
        for path, info in base.children(recursive=len(pattern) > 1 or pattern == ["**"])
        if info.type is FileType.File and _fits(path.split("/"), pattern)
    ]
    if not matching:
        raise TextFileError(name, "matches no file", None, "Check the path.")
    return matching


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Match a path with a glob, part by part; ``**`` is any number of directories."""
    if pattern and pattern[0] == "**":
        return pattern == ["**"] or any(_fits(path[skipped:], pattern[1:]) for skipped in range(len(path) + 1))
    if not path or not pattern:
        return not path and not pattern
    return fnmatch.fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])


def _at(place: Place) -> list[Place]:
    kind = place.info.type
    if kind is FileType.File:
        return [place]
    if kind is FileType.NotFound:
        raise TextFileError(place.name, "does not exist", None, "Check the path.")
    visible = [
        path
        for path, info in place.children(recursive=True)
        if info.type is FileType.File and not any(part.startswith((".", "_")) for part in path.split("/"))
    ]
    readable = [place / path for path in visible if READABLE.search(path)]
    if not readable:
        raise TextFileError(place.name, "holds no texts", "files that end in .parquet or .jsonl are expected")
    if others := len(visible) - len(readable):
        logger.warning("%s: %d files that are neither Parquet nor JSON Lines are left out", place.name, others)
    return readable
