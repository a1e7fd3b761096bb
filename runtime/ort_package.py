"""The package onnxruntime: imported where it is needed, with the provider that is wanted, in a release that works."""

import re
from typing import Any

from gircse.runtime.errors import ProviderError
from gircse.runtime.precision import SPECS, Precision
from gircse.runtime.provider import Provider

EXECUTION_PROVIDERS = {
    Provider.CPU: ("CPUExecutionProvider",),
    Provider.CUDA: ("CUDAExecutionProvider", "CPUExecutionProvider"),
    Provider.ORT_TENSORRT: ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
"""What each provider requests from ONNX Runtime; the later ones take the few nodes that compute shapes."""


def import_onnxruntime(provider: Provider) -> Any:
    """Import onnxruntime and check that it was built with a provider.

    Raises:
        ProviderError: it is not installed, or was built without the provider.
    """
    extra = "cpu" if provider is Provider.CPU else "gpu"
    try:
        import onnxruntime
    except ImportError as err:
        raise ProviderError(
            f"provider {provider}",
            "needs onnxruntime, which is not installed",
            None,
            f"Install it: pip install 'gircse-deploy[{extra}]'",
        ) from err
    wanted = EXECUTION_PROVIDERS[provider][0]
    if wanted not in onnxruntime.get_available_providers():
        raise ProviderError(
            f"provider {provider}",
            f"needs {wanted}",
            f"this onnxruntime has {', '.join(onnxruntime.get_available_providers())}",
            f"Replace it: pip uninstall onnxruntime && pip install 'gircse-deploy[{extra}]'",
        )
    return onnxruntime


def check_release(onnxruntime: Any, precision: str) -> None:
    """Refuse a release of ONNX Runtime that is known to run a precision wrong on the CPU.

    Raises:
        ProviderError: it is older than the first that runs it right.
    """
    if precision not in SPECS:
        return
    oldest = SPECS[Precision(precision)].onnxruntime
    if _release(onnxruntime.__version__) < _release(oldest):
        raise ProviderError(
            f"onnxruntime {onnxruntime.__version__}",
            f"cannot run {precision}",
            f"it takes {oldest} or later",
            "Upgrade: pip install -U onnxruntime, or choose another precision.",
        )


def _release(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
