"""The Python modules of TensorRT: which there are, how they are imported, and where their log goes.

``tensorrt`` 10.15 or later, ``tensorrt`` 11 and ``tensorrt_rtx`` share the names that this package uses.
"""

import importlib
import logging
from collections.abc import Mapping
from typing import Any

from gircse.runtime.errors import ProviderError
from gircse.runtime.provider import Provider

logger = logging.getLogger(__name__)

MODULES: Mapping[Provider, str] = {Provider.TENSORRT: "tensorrt", Provider.TENSORRT_RTX: "tensorrt_rtx"}
"""The providers that run engines, and the module of each."""

_LEVELS = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.WARNING}


def import_tensorrt(provider: Provider) -> Any:
    """Import the Python module of a TensorRT.

    Raises:
        ProviderError: it is not installed.
    """
    name = MODULES[provider]
    try:
        return importlib.import_module(name)
    except ImportError as err:
        raise ProviderError(
            f"provider {provider}",
            f"needs the package {name}, which cannot be imported ({err})",
            None,
            f"Install it: pip install 'gircse-deploy[{provider}]'",
        ) from err


def tensorrt_logger(module: Any) -> Any:
    """Return an ``ILogger`` that writes to Python's logging and keeps the errors for our own messages."""

    class TensorRtLogger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)  # pybind11 requires an explicit call of the base
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = _LEVELS.get(severity.name, logging.DEBUG)
            logger.log(level, "TensorRT: %s", message)
            if level == logging.ERROR:
                self._errors.append(message)

        def drain(self) -> str:
            """Return the first error since the last call; those after it mostly repeat it."""
            errors, self._errors = self._errors, []
            return errors[0] if errors else ""

    return TensorRtLogger()
