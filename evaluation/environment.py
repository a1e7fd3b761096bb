"""The machine and the versions that a measurement was made with."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import psutil

PACKAGES = (
    "gircse-deploy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "numpy",
    "torch",
    "transformers",
    "llama-cpp-python",
)


def describe_environment() -> dict[str, str]:
    """Return processor, cores, memory, GPU, Python and the versions of the installed packages that matter."""
    found = {
        "processor": _processor(),
        "cores": str(psutil.cpu_count(logical=False) or psutil.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if gpu := _gpu():
        found["gpu"] = gpu
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _gpu() -> str | None:
    """Return name, driver and memory of the first GPU; None where NVIDIA's driver shows none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
