"""The machine and the versions that a measurement was made with."""

import importlib.metadata
import platform
from pathlib import Path

import psutil

PACKAGES = ("gircse-deploy", "onnxruntime", "numpy", "torch", "transformers", "llama-cpp-python")


def describe_environment() -> dict[str, str]:
    """Return processor, cores, memory, Python and the versions of the installed packages that matter."""
    found = {
        "processor": _processor(),
        "cores": str(psutil.cpu_count(logical=False) or psutil.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
