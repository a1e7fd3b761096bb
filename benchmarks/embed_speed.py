"""Load time, latency, throughput and batch variance of a bundle against the PyTorch loop it was exported from.

    gircse-export --steps 8 --output /tmp/unrolled
    gircse-export --steps 8 --layout stepwise --output /tmp/stepwise
    python benchmarks/embed_speed.py /tmp/unrolled /tmp/stepwise

Both backends run FP32 on the same threads in the same process, warmed up alike, their repeats interleaved. PyTorch is
the reference loop (Hugging Face model, SDPA, KV cache, adapter merged) with the same prompts; for the mixed texts both
try the same batch sizes and each keeps its best, PyTorch with the texts in the given order and sorted by length.
"""

import argparse
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from gircse.checkpoint.reference import load_reference, step_states
from gircse.evaluation.parity.references import source_checkpoint
from gircse.runtime import Embedder
from gircse.runtime.batch_planner import pad_batch
from gircse.runtime.numerics import l2_normalize, prefix_means
from gircse.runtime.text_files import read_texts

BATCH_SIZES = (8, 16, 32)


def main() -> None:
    """Run every measurement and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--texts", type=Path, help="one text per line (default: 256 pieces of this project's prose)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}")
    torch.set_num_threads(args.threads)
    for bundle in args.bundles:
        print_load_time(bundle, args.threads)
    embedders = {bundle.name: Embedder(bundle, threads=args.threads) for bundle in args.bundles}
    reference = Reference(next(iter(embedders.values())))
    print_latency(embedders, reference, tokens=24, repeats=args.repeats)
    texts = read_texts(args.texts)[:256] if args.texts else project_prose(256)
    print_throughput(embedders, reference, texts)
    for name, embedder in embedders.items():
        alone = np.concatenate([embedder.encode([text]) for text in texts])
        largest = max(np.abs(alone - embedder.encode(texts, batch_size=size)).max() for size in (8, 32, 256))
        print(f"batch variance, {name}: largest difference {largest:.1e} over {len(texts)} texts")


class Reference:
    """The PyTorch backend: token ids in, z_K out."""

    def __init__(self, embedder: Embedder) -> None:
        """Load the model that the bundle's manifest names."""
        manifest = embedder.manifest
        self.steps, self.temperature = manifest.graph.steps, manifest.graph.temperature
        self.model = load_reference(source_checkpoint(manifest))

    def __call__(self, token_ids: Sequence[list[int]]) -> np.ndarray:
        """Embed one batch."""
        batch = pad_batch(tuple(range(len(token_ids))), token_ids, pad_token_id=0)
        ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
        states = step_states(self.model, ids, mask, steps=self.steps, temperature=self.temperature)
        return l2_normalize(prefix_means(states[:, 1:].numpy())[:, -1])


def print_load_time(bundle: Path, threads: int) -> None:
    """Time ``Embedder(path)`` in fresh processes, hashes checked and not."""
    for verify in (True, False):
        code = (
            "import time; from gircse.runtime import Embedder; import onnxruntime; start = time.perf_counter(); "
            f"Embedder({str(bundle)!r}, threads={threads}, verify={verify}); print(time.perf_counter() - start)"
        )
        runs = [
            float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
            for _ in range(4)
        ]
        print(f"load {bundle.name}, verify={verify}: {spread(runs[1:])}")


def print_latency(embedders: dict[str, Embedder], reference: Reference, *, tokens: int, repeats: int) -> None:
    """Time one prompt of so many tokens, every backend in turn."""
    ids = random.Random(0).choices(range(1000, 40000), k=tokens)
    backends: dict[str, Callable[[], object]] = {"torch": lambda: reference([ids])}
    for name, embedder in embedders.items():
        backends[name] = lambda embedder=embedder: list(embedder.run_batches([ids]))
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(repeats + 2):
        for name, backend in backends.items():
            seconds[name].append(timed(backend))
    for name, runs in seconds.items():
        ratio = statistics.median(seconds["torch"][2:]) / statistics.median(runs[2:])
        print(f"one prompt of {tokens} tokens, K = {reference.steps}, {name}: {spread(runs[2:])}, {ratio:.2f} x torch")


def print_throughput(embedders: dict[str, Embedder], reference: Reference, texts: Sequence[str]) -> None:
    """Time all texts at several batch sizes, every backend in turn, and compare the best."""
    first = next(iter(embedders.values()))
    token_ids = first.tokenizer(texts)
    lengths = sorted(map(len, token_ids))
    print(f"{len(texts)} texts: {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}")
    by_length = sorted(token_ids, key=len)

    def run_reference(ordered: Sequence[list[int]], size: int) -> None:
        for start in range(0, len(ordered), size):
            reference(ordered[start : start + size])

    best: dict[str, tuple[float, int]] = {}
    for size in BATCH_SIZES:
        backends: dict[str, Callable[[], object]] = {
            "torch, given order": lambda size=size: run_reference(token_ids, size),
            "torch, sorted": lambda size=size: run_reference(by_length, size),
        }
        for name, embedder in embedders.items():
            backends[name] = lambda embedder=embedder, size=size: embedder.encode(
                texts, batch_size=size, batch_tokens=1 << 30
            )
        for name, backend in backends.items():
            best[name] = min(best.get(name, (float("inf"), 0)), (timed(backend), size))
    for name, (seconds, size) in best.items():
        ratios = ", ".join(
            f"{best[reference_name][0] / seconds:.2f} x {reference_name}"
            for reference_name in ("torch, given order", "torch, sorted")
        )
        print(f"{name}: {seconds:.2f} s at its best batch size {size}, {len(texts) / seconds:.1f} texts/s; {ratios}")


def project_prose(count: int) -> list[str]:
    """Cut the project's own prose into texts of 4 to 80 words, short ones more often, the same every time."""
    root = Path(__file__).parents[1]
    words = (root / "README.md").read_text(encoding="utf-8").split()
    draw = random.Random(0)
    texts = []
    for _ in range(count):
        start, length = draw.randrange(len(words) - 80), round(4 * 20 ** draw.random())
        texts.append(" ".join(words[start : start + length]))
    return texts


def timed(backend: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    backend()
    return time.perf_counter() - start


def spread(seconds: Sequence[float]) -> str:
    """Return the median and the range."""
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


if __name__ == "__main__":
    main()
