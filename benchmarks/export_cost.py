"""Time and peak memory of exports, each in a process of its own.

python benchmarks/export_cost.py demo                  # K = 8 and K = 32, model already downloaded
python benchmarks/export_cost.py qwen2.5-7b --scratch DIR   # random weights in the shape of Qwen2.5-7B, 45 GB of disk
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from gircse.checkpoint.demo import demo_checkpoint

GIB = 2**30

QWEN25_7B = Qwen2Config(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    max_position_embeddings=32768,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    eos_token_id=0,
    dtype="bfloat16",
)


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["demo", "qwen2.5-7b"])
    parser.add_argument("--scratch", type=Path, help="folder for models and bundles (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        if args.model == "demo":
            demo_checkpoint()  # not part of the measurement
            seconds = {steps: timed_export(Path(scratch), "--steps", str(steps)) for steps in (8, 32)}
            print(f"K = 32 against K = 8: {seconds[32] / seconds[8]:.2f} x")
        else:
            model = make_random_model(QWEN25_7B, Path(scratch) / "qwen2.5-7b-random")
            timed_export(Path(scratch), "--steps", "8", "--model", str(model))


def timed_export(scratch: Path, *flags: str) -> float:
    """Run ``gircse-export``, print its cost and return the seconds."""
    output = scratch / "bundle"
    start = time.perf_counter()
    subprocess.run(["gircse-export", *flags, "--output", str(output)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    # Peak of the largest child so far: the largest model runs in a process of its own, alone.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(
        f"{' '.join(flags)}: {seconds:.1f} s, peak memory {peak / GIB:.2f} GiB, bundle {size / GIB:.2f} GiB", flush=True
    )
    shutil.rmtree(output)
    return seconds


def make_random_model(config: Qwen2Config, directory: Path) -> Path:
    """Write a model with small random BF16 weights, one shard a layer, so that it never lies in memory whole."""
    directory.mkdir()
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_checkpoint() / name, directory / name)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        group = name.split(".")[2] if ".layers." in name else name
        shards.setdefault(f"model-{group}.safetensors", {})[name] = shape
    for shard, members in shards.items():
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, shape in members.items()
        }
        save_file(tensors, directory / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


if __name__ == "__main__":
    sys.exit(main())
