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
MAX_DIFFERENCE = {AVX2: 1e-4, SSE: 0.02}
"""Measured: 1.9e-5 with AVX2. With SSE 6.4e-3 in one text of three from its second step on: FP32 sums in another order
round an activation to the next integer. 0.12 where 8-bit products saturate."""

needs_qemu = pytest.mark.skipif(
    QEMU is None or platform.machine() != "x86_64",
    reason="needs x86-64 and qemu-x86_64, of the Debian package qemu-user",
)


def run_on(cpu: str, *command: str | Path, **options: Any) -> None:
    """Run a program on another CPU."""
    assert QEMU is not None
    subprocess.run([QEMU, "-cpu", cpu, *command], check=True, **options)
