"""Time and peak memory of exports of the demo, K = 8 and K = 32, each in a process of its own.

python benchmarks/export_cost.py
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gircse.checkpoint.demo import demo_checkpoint

GIB = 2**30


def main() -> None:
    """Export twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, help="folder for bundles (default: a temporary one)")
    args = parser.parse_args()
    demo_checkpoint()  # not part of the measurement
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        seconds = {steps: timed_export(Path(scratch), "--steps", str(steps)) for steps in (8, 32)}
    print(f"K = 32 against K = 8: {seconds[32] / seconds[8]:.2f} x")


def timed_export(scratch: Path, *flags: str) -> float:
    """Run ``gircse-export``, print its cost and return the seconds."""
    output = scratch / "bundle"
    start = time.perf_counter()
    subprocess.run(["gircse-export", *flags, "--output", str(output)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    # Peak of the largest child so far: K = 32 takes no less than K = 8.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(
        f"{' '.join(flags)}: {seconds:.1f} s, peak memory {peak / GIB:.2f} GiB, bundle {size / GIB:.2f} GiB", flush=True
    )
    shutil.rmtree(output)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
