"""The one family of errors that users of the toolkit see.

An error is data (:class:`GircseError` lists its parts) and prints as plain sentences::

    input_ids has shape (33, 512); the engine takes batch 1..32. Split the batch, or rebuild with --batch 1:8:33.

A wrong type is a plain ``TypeError``, its text made by the same :func:`sentence`.
"""

import textwrap
from enum import StrEnum
from typing import TypeVar

Member = TypeVar("Member", bound=StrEnum)

MAX_PART = 2000
"""Longest part of a printed error, in characters; the commands in hints are shorter."""


class GircseError(Exception):
    """Base of every error of the toolkit.

    Attributes:
        where: what is wrong: a file, a flag, a tensor.
        got: what was found there, as the rest of a sentence that begins with ``where``.
        expected: what should have been there, as a clause of its own; None where ``got`` says enough.
        hint: what to do, as a sentence; a hint that ends with a command has no full stop after it. None where nobody
            can know.
    """

    def __init__(self, where: str, got: str, expected: str | None = None, hint: str | None = None) -> None:
        # All parts are arguments, so that an error survives the way from one process to another.
        super().__init__(where, got, expected, hint)
        self.where, self.got, self.expected, self.hint = where, got, expected, hint

    def __str__(self) -> str:
        return sentence(self.where, self.got, self.expected, self.hint)


class BundleError(GircseError):
    """A bundle is missing, damaged, unsafe, or not what its manifest says."""


class CheckpointError(GircseError):
    """A model, adapter or tokenizer cannot be found, read or used."""


class CalibrationError(GircseError):
    """A calibration cannot be made, read, or used for this model."""


class ExportError(GircseError):
    """An export or a build cannot start or cannot finish."""


class ProviderError(GircseError):
    """The requested execution provider is not available."""


class EngineMismatchError(ProviderError):
    """The bundle has an engine, but for another TensorRT, GPU or export."""


class TextFileError(GircseError):
    """A file of texts cannot be read, is not UTF-8, or holds no text."""


class MeasurementError(GircseError):
    """A measurement cannot be made: unusable texts or tasks, or values that are not finite."""


class OutputError(GircseError):
    """A file or directory cannot be written: no room, no permission, or something else stands there."""


class OptionError(GircseError, ValueError):
    """A flag or an argument has a value that it cannot have."""


def sentence(where: str, got: str, expected: str | None = None, hint: str | None = None) -> str:
    """Join the parts of an error (see :class:`GircseError`); parts that are None leave no trace.

    The text is one line that a terminal can show, whatever a damaged file put into the parts.
    """
    text = f"{readable(where)} {readable(got)}".rstrip(".")
    if expected is not None:
        text += f"; {readable(expected).rstrip('.')}"
    return f"{text}. {readable(hint)}" if hint is not None else f"{text}."


def readable(part: str) -> str:
    """Put a part on one line, escape what cannot be printed, and leave out the middle of one that is too long."""
    line = " ".join(part.splitlines())
    if len(line) > MAX_PART:
        line = f"{line[: MAX_PART // 2]} [...] {line[-MAX_PART // 2 :]}"
    return line if line.isprintable() else "".join(map(_printable, line))


def reason_of(err: Exception) -> str:
    """Return what an error of another library says, in one line of bounded length."""
    return textwrap.shorten(str(err).strip("'\""), 300) or type(err).__name__


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def member_of(kind: type[Member], where: str, value: str) -> Member:
    """Return the member of an enum that a caller named; ``where`` is the argument.

    Raises:
        OptionError: there is no such member.
    """
    try:
        return kind(value)
    except ValueError as err:
        raise OptionError(where, f"is {value!r}", f"it has to be one of {', '.join(kind)}") from err
