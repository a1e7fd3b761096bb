"""The Python modules of TensorRT: which there are, how they are imported, and what they log.

``tensorrt`` 10.15 or later, 11 and ``tensorrt_rtx`` share the names that this package uses.
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
            f"{provider}: {name} is not installed ({err}) | TensorRT's Python package | "
            f"pip install 'gircse-deploy[{provider}]'"
        ) from err


def tensorrt_logger(module: Any) -> Any:
    """Return an ``ILogger`` that writes to Python's logging and keeps the errors for our own messages."""

    class TensorRtLogger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)  # pybind11 wants the base called by name
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = _LEVELS.get(severity.name, logging.DEBUG)
            logger.log(level, "TensorRT: %s", message)
            if level == logging.ERROR:
                self._errors.append(message)

        def drain(self) -> str:
            """Return the first error since the last call; what follows it is mostly its echo."""
            errors, self._errors = self._errors, []
            return errors[0] if errors else ""

    return TensorRtLogger()
