"""A directory that is published atomically, and replaces another one only when told to.

The bundle grows in ``.NAME.partial`` next to its destination, is flushed to the disk, and is renamed into place. A
replaced bundle waits in ``.NAME.replaced`` until the new one stands. A crash leaves at most these two behind; the next
export to the same place removes the first and puts the second back if its successor never arrived.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gircse.runtime.errors import OutputError
from gircse.runtime.manifest import MANIFEST_NAME


def check_destination(destination: Path, *, force: bool) -> None:
    """Refuse a destination that the export may not take.

    Raises:
        OutputError: its folder cannot be written, or something is there: no bundle, or a bundle and no ``force``.
    """
    parent = next(path for path in destination.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"--output {destination}",
            f"cannot be made in {parent}, which is not writable",
            None,
            "Choose another --output.",
        )
    if not destination.exists() and not destination.is_symlink():
        return
    is_bundle = destination.is_dir() and (destination / MANIFEST_NAME).is_file()
    if not is_bundle and not _is_empty_directory(destination):
        raise OutputError(
            f"--output {destination}",
            "exists and is not a bundle",
            "nothing but a bundle is ever replaced",
            "Choose another --output.",
        )
    if is_bundle and not force:
        raise OutputError(
            f"--output {destination}",
            "is a bundle already",
            None,
            "Add --force to replace it, or choose another path.",
        )


@contextlib.contextmanager
def staged_directory(destination: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty directory that becomes ``destination`` if the block succeeds and vanishes if it fails.

    Raises:
        OutputError: the destination is taken, cannot be written, or another export to it is running.
    """
    replaced = destination.with_name(f".{destination.name}.replaced")
    with _locked_directory(destination) as partial:
        try:
            if replaced.exists():
                if destination.exists():
                    shutil.rmtree(replaced)
                else:
                    replaced.rename(destination)
            check_destination(destination, force=force)
            yield partial
            _flush(partial)
            if destination.exists():
                destination.rename(replaced)
            partial.rename(destination)
            _flush_directory(destination.parent)
        except BaseException:  # only now: once published, a .partial belongs to the next export
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _locked_directory(destination: Path) -> Iterator[Path]:
    """Yield an empty ``.NAME.partial``, locked against a second export.

    The kernel releases the lock however this process ends, so what a killed export left can be removed.
    """
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
    except OSError as err:
        raise OutputError(
            f"--output {destination}", f"cannot be made: {err.strerror}", None, "Choose another --output."
        ) from err
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between open and lock the other export may have published or removed the directory.
            ours = partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat())
        except BlockingIOError:
            ours = False
        if not ours:
            raise OutputError(
                f"--output {destination}", "is being written by another export", None, "Wait until it has finished."
            )
        for leftover in partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield partial
    finally:
        os.close(descriptor)


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _flush(directory: Path) -> None:
    """Flush every file and folder to the disk, so that the rename cannot outrun the contents."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _flush_directory(path)
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
