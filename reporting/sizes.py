"""Sizes and durations, as reports and messages print them."""

import resource
import sys


def gib(size: int) -> str:
    """Return a size in bytes as text: ``1.20 GiB``."""
    return f"{size / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """Return a rough duration as text: ``40 s``, ``12 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def peak_memory() -> int:
    """Return the most memory that this process has held so far, in bytes."""
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
