"""Run GIRCSE bundles without torch."""

from gircse.runtime.embedder import Embedder, SelfTestReport
from gircse.runtime.errors import (
    BundleError,
    CheckpointError,
    ExportError,
    GircseError,
    MeasurementError,
    ProviderError,
    TextFileError,
)
from gircse.runtime.manifest import Manifest
from gircse.runtime.tokenization import Overflow

__all__ = [
    "BundleError",
    "CheckpointError",
    "Embedder",
    "ExportError",
    "GircseError",
    "Manifest",
    "MeasurementError",
    "Overflow",
    "ProviderError",
    "SelfTestReport",
    "TextFileError",
]
