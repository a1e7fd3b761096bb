"""Sizes as people read them."""

import resource
import sys


def gib(size: float) -> str:
    """Return a number of bytes as text, such as ``1.25 GiB``."""
    return f"{size / 2**30:.2f} GiB"


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
