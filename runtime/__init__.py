"""Run GIRCSE bundles without torch."""

from importlib.metadata import version

from gircse.runtime.embedder import Embedder
from gircse.runtime.errors import (
    BundleError,
    CalibrationError,
    CheckpointError,
    ExportError,
    GircseError,
    MeasurementError,
    OptionError,
    OutputError,
    ProviderError,
    TextFileError,
)
from gircse.runtime.manifest import Manifest
from gircse.runtime.self_test import SelfTestReport
from gircse.runtime.tokenization import Overflow

__version__ = version("gircse-deploy")

__all__ = [
    "BundleError",
    "CalibrationError",
    "CheckpointError",
    "Embedder",
    "ExportError",
    "GircseError",
    "Manifest",
    "MeasurementError",
    "OptionError",
    "OutputError",
    "Overflow",
    "ProviderError",
    "SelfTestReport",
    "TextFileError",
    "__version__",
]
