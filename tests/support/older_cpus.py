"""x86 CPUs without VNNI, emulated by QEMU."""

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

QEMU = shutil.which("qemu-x86_64")
AVX2, SSE = "Haswell-v4", "Nehalem"
TEXTS = ["the bird number one", "hello", "what is a bundle written for"]
MAX_DIFFERENCE = 1e-4
"""Measured: 1.9e-5, from FP32 sums in another order; 0.12 where 8-bit products saturate."""

needs_qemu = pytest.mark.skipif(
    QEMU is None or platform.machine() != "x86_64",
    reason="needs x86-64 and qemu-x86_64, of the Debian package qemu-user",
)


def run_on(cpu: str, *command: str | Path, **options: Any) -> None:
    """Run a program on another CPU."""
    assert QEMU is not None
    subprocess.run([QEMU, "-cpu", cpu, *command], check=True, **options)
