"""Build time and plan size of TensorRT-RTX engines, each build in a process of its own. Needs no GPU.

python benchmarks/engine_build.py demo --steps 1,2,4,8,16 --limit 700
python benchmarks/engine_build.py qwen2.5-0.5b --steps 8 --limit 700    # random weights, same shapes
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from seven_b_checkpoint import make_checkpoint

from gircse.runtime.command import comma_separated


def main() -> None:
    """Export for each K, and build every precision in both layouts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["demo", "qwen2.5-0.5b"])
    parser.add_argument("--steps", type=comma_separated(int), required=True)
    parser.add_argument("--precision", type=comma_separated(str), default=("fp16", "bf16"))
    parser.add_argument("--layout", type=comma_separated(str), default=("stepwise", "unrolled"))
    parser.add_argument("--limit", type=float, default=900, help="seconds after which a build is aborted")
    parser.add_argument("--build-flags", default="", help="further flags of gircse-build")
    parser.add_argument("--scratch", type=Path, help="folder for models and bundles (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        model = "demo"
        if args.model != model:
            model = f"{scratch}/{args.model}"
            make_checkpoint("0.5b", Path(model))
        for steps in args.steps:
            bundle = Path(scratch) / f"bundle-{steps}"
            flags = ["--model", model, "--precision", ",".join(args.precision), "--output", str(bundle)]
            subprocess.run(["gircse-export", "--steps", str(steps), *flags], check=True, stdout=subprocess.DEVNULL)
            for layout in args.layout:
                for precision in args.precision:
                    flags = ["--precision", precision, "--layout", layout, *args.build_flags.split()]
                    print(f"K = {steps}, {layout}, {precision}: {timed_build(bundle, flags, args.limit)}", flush=True)


def timed_build(bundle: Path, flags: list[str], limit: float) -> str:
    """Run ``gircse-build`` and return its time, the size of the plan and that of the weights."""
    command = ["gircse-build", str(bundle), "--provider", "tensorrt-rtx", "--sm", "8.9", *flags]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"not done after {limit:.0f} s"
    path = Path(done.stdout.strip())
    facts = json.loads(path.with_suffix(".json").read_text())
    weights = (bundle / facts["precision"] / "weights.bin").stat().st_size
    path.unlink()
    path.with_suffix(".json").unlink()
    return f"{facts['build_seconds']} s, plan {facts['plan_bytes'] / 1e6:.0f} MB, weights {weights / 1e6:.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
