"""The one family of errors that users of the toolkit see.

Every message reads *where: what came | what was expected | what to do*.
A bad argument is a plain ``ValueError`` or ``TypeError``.
"""


class GircseError(Exception):
    """Base of every error about an artifact, a checkpoint or a failed build."""


class BundleError(GircseError):
    """A bundle is missing, damaged, unsafe, or not what its manifest says."""


class CheckpointError(GircseError):
    """A model, adapter or tokenizer cannot be found, read or used."""


class ExportError(GircseError):
    """An export cannot start or cannot finish."""


class ProviderError(GircseError):
    """The requested execution provider is not available."""


class EngineMismatchError(ProviderError):
    """The bundle has an engine, but for another TensorRT, GPU or export."""


class TextFileError(GircseError):
    """A file of texts cannot be read, is not UTF-8, or holds no text."""


class MeasurementError(GircseError):
    """A measurement cannot be made: unusable texts or tasks, or values that are not finite."""
