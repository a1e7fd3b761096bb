"""Tables and the chart of ``seven_b.py``, from its result files, and estimates for GPUs that nobody has measured.

python benchmarks/seven_b_report.py RESULTS    # written again, without measuring
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seven_b_checkpoint import CONFIGS

from gircse.reporting.figures import new_panels, save_chart
from gircse.reporting.files import markdown_table, write_files
from gircse.reporting.sizes import gib

MUST: Mapping[str, tuple[float | None, float | None, float | None]] = {
    "export-fp16": (6, 25, None),
    "calibrate-off": (8, None, None),
    "calibrate-kinds": (8, None, None),
    "export-int8": (3, None, None),
    "embed-int8": (None, None, 1.15),
    "parity-int8": (None, None, 1.15),
}
"""What a step of a 7B may take: GiB of memory, minutes, memory as a multiple of the file of INT8 weights."""

ESTIMATE_FACTOR = 1.5
"""How far a stated estimate of time may be off."""

GROWTH_STEPS = ("export-fp16", "calibrate-off", "export-int8", "embed-int8", "parity-int8")


@dataclass(frozen=True)
class Gpu:
    """A GPU, by its data sheet.

    Attributes:
        name: of the card.
        memory: bytes.
        bandwidth: bytes a second from its memory.
        flops: of BF16 products with FP32 sums, a second, without sparsity.
        fp32_flops: of FP32 products.
        link: bytes a second from main memory, four fifths of the bus.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    fp32_flops: float
    link: float


GPUS = (
    Gpu("24 GB (RTX 4090)", 24e9, 1.008e12, 165e12, 82.6e12, 0.8 * 32e9),
    Gpu("80 GB (H100 SXM)", 80e9, 3.35e12, 989e12, 67e12, 0.8 * 64e9),
)
UTILIZATION = 0.4
"""Share of a data sheet's numbers that is counted on."""

READ_RATE = 2e9
"""Bytes of a BF16 checkpoint a second, from an NVMe disk or the cache of files, to FP32 with the adapter merged, by the
processor. On 2 cores it is a fraction of that."""


@dataclass(frozen=True)
class Work:
    """A use of the PyTorch reference or of a bundle, to be estimated.

    Attributes:
        name: in words.
        texts: how many.
        tokens: of each.
        runs: how often the texts run through the model.
        item: bytes of a weight.
        streamed: whether the weights go over the bus once a step where they do not fit.
    """

    name: str
    texts: int
    tokens: int
    runs: int
    item: int
    streamed: bool


WORKS = (
    Work("golden vectors and probe, FP32", 12, 16, 2, 4, True),
    Work("calibrate: observe 512 texts, FP32", 512, 64, 1, 4, True),
    Work("calibrate: sensitivity of kinds on 64 texts, BF16", 64, 64, 10, 2, True),
    Work("parity, PyTorch side, 64 texts, FP32", 64, 24, 1, 4, True),
    Work("embed 1,000 texts, FP16 bundle", 1000, 64, 1, 2, False),
)
K = 4


def write_report(results: Path) -> Iterator[Path]:
    """Write ``seven_b.md`` and ``growth.png`` next to the results, and yield their paths."""
    shapes = {
        folder.name: [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
        for folder in sorted(results.iterdir())
        if folder.is_dir()
    }
    parts = ["# Every command on a 7B", *(_shape_section(name, steps) for name, steps in shapes.items())]
    parts += ["## Estimates for GPUs", _gpu_estimates()]
    yield from write_files({"seven_b.md": ("\n\n".join(parts) + "\n").encode()}, results)
    whole = [step for steps in shapes.values() for step in steps if step["step"] != "checkpoint"]
    if whole:
        yield from _growth_chart(whole, results)


def _shape_section(shape: str, steps: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of a shape."""
    rows = []
    for step in sorted(steps, key=lambda step: list(MUST).index(step["step"]) if step["step"] in MUST else -1):
        rows.append([
            f"`{step['step']}`",
            _minutes(step["seconds"]),
            _minutes(step["estimated_seconds"]) if step["estimated_seconds"] else "",
            gib(step["available_memory"]),
            gib(step["peak_memory"]),
            gib(step["peak_anonymous"]),
            gib(step["bytes_read"]) if step["bytes_read"] else "",
            gib(step["disk"]),
            gib(step["peak_disk"]),
            str(step["exit_code"]),
            f"{step['load_at_start']:.1f}",
            "; ".join(_missed(step)) or "yes",
        ])  # fmt: skip
    header = ("step", "time", "estimated", "memory there is", "peak memory", "without files", "read by PyTorch")
    header = (*header, "disk", "peak disk", "exit code", "load at start", "as it must be")
    return f"## {shape}\n\n{markdown_table(header, rows)}"


def _missed(step: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a step took beyond what it may take; a smaller model has the limits of a 7B."""
    memory, minutes, share = MUST.get(step["step"], (None, None, None))
    if memory is not None and step["peak_memory"] > memory * 2**30:
        yield f"more than {memory} GiB"
    if minutes is not None and step["seconds"] > minutes * 60:
        yield f"more than {minutes} min"
    if share is not None and step["weights"] and step["peak_memory"] > share * step["weights"]:
        yield f"{step['peak_memory'] / step['weights']:.2f} times the weights, not {share}"
    estimated = step["estimated_seconds"]
    if estimated and not 1 / ESTIMATE_FACTOR <= step["seconds"] / estimated <= ESTIMATE_FACTOR:
        yield f"{step['seconds'] / estimated:.2f} times the estimate"


def _growth_chart(steps: Sequence[Mapping[str, Any]], results: Path) -> Iterator[Path]:
    """Draw time and memory against parameters, tokens and K."""
    axes_of = (("billions of parameters", "parameters"), ("tokens of a text", "tokens"), ("K", "k"))
    titles = [f"{what} against {label}" for what in ("minutes", "GiB") for label, _ in axes_of]
    figure, panels = new_panels("Growth", titles, columns=3)
    for panel, (what, (label, axis)) in zip(
        panels, ((what, axis) for what in ("minutes", "GiB") for axis in axes_of), strict=True
    ):
        for color, name in enumerate(GROWTH_STEPS):  # one legend serves all panels
            points = sorted(_points(steps, name, axis, what))
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", color=f"C{color}", label=name)
        panel.set(xscale="log", yscale="log", xlabel=label, ylabel=what)
        values = sorted({x for line in panel.lines for x in line.get_xdata()})
        panel.set_xticks(values, [f"{x:.2g}" if axis == "parameters" else f"{x:g}" for x in values])
        panel.set_xticks([], minor=True)
    panels[0].legend(fontsize=7)
    yield from save_chart(figure, results / "growth", formats=("png",))


def _points(steps: Sequence[Mapping[str, Any]], name: str, axis: str, what: str) -> Iterator[tuple[float, float]]:
    """Yield the points of one line: of all shapes against parameters, else of the smallest shape that varies."""
    same = [step for step in steps if step["step"] == name or step["step"].startswith(f"{name}-")]
    if axis == "parameters":
        chosen = [step for step in same if step["step"] == name]
    else:
        other = "k" if axis == "tokens" else "tokens"
        smallest = min((step["parameters"] for step in same), default=0)
        base = [step["settings"][other] for step in same if step["step"] == name]
        chosen = [step for step in same if step["parameters"] == smallest and step["settings"].get(other) in base]
        if len(chosen) < 2:
            return
    for step in chosen:
        x = step["parameters"] / 1e9 if axis == "parameters" else step["settings"][axis]
        yield x, step["seconds"] / 60 if what == "minutes" else step["peak_memory"] / 2**30


def _gpu_estimates() -> str:
    """Return what a 7B takes on GPUs by arithmetic: FLOP, bytes read, minutes."""
    config = CONFIGS["qwen-7b"]
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    layers = config["num_hidden_layers"] * (2 * hidden * (hidden + kv) + 3 * hidden * config["intermediate_size"])
    rows = []
    for work in WORKS:
        positions = work.texts * work.runs * (work.tokens + K)
        flop = 2 * layers * positions + 4 * vocabulary * hidden * K * work.texts * work.runs
        size = work.item * (layers + 2 * vocabulary * hidden)
        cells = [work.name, f"{flop:.1e}"]
        for gpu in GPUS:
            fits = size < 0.9 * gpu.memory
            sweeps = 1 if fits or not work.streamed else K + 1
            rate = UTILIZATION * (gpu.fp32_flops if work.item == 4 else gpu.flops)
            over_link = sweeps * size / gpu.link
            stored = sweeps * size * 2 / work.item  # BF16
            batches = -(-work.texts // 32)
            from_memory = work.runs * (K + 1) * batches * size / (UTILIZATION * gpu.bandwidth)
            seconds = max(over_link, stored / READ_RATE) + max(flop / rate, from_memory if fits else 0)
            kept = "whole" if fits else f"streamed, {sweeps} sweeps"
            cells.append(f"{kept}; {stored / 1e9:.0f} GB read; {_minutes(seconds)}")
        rows.append(cells)
    note = (
        f"By arithmetic, not measured. Qwen2.5-7B, K = {K}; data sheets at {UTILIZATION:.0%} of their numbers; weights "
        f"come to the GPU at no more than {READ_RATE / 1e9:.0f} GB of BF16 a second, which takes a processor with many "
        "cores. What a calibration does besides its forward passes, GPTQ above all, is left out."
    )
    return f"{note}\n\n{markdown_table(('work', 'FLOP', *(gpu.name for gpu in GPUS)), rows)}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    print(*write_report(Path(sys.argv[1])), sep="\n")
