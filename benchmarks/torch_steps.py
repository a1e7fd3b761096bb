"""The official PyTorch loop on a bundle's checkpoint, and where its time goes: prompt, steps, vocabulary passes.

    python benchmarks/torch_steps.py BUNDLE --device cuda --dtype fp16 --batch 1,32 --tokens 24 --steps 8 --output F

The loop is that of the official code, with scaled-dot-product attention: it projects every position of the prompt to
the vocabulary, and makes a soft token after the last step that nothing reads. It is measured with and without that last
vocabulary pass. Its parts are timed by CUDA events in the stream, on the CPU by the clock.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from gircse.checkpoint.reference import load_reference
from gircse.evaluation.parity.references import source_checkpoint
from gircse.reporting.files import write_files
from gircse.runtime.bundle import Bundle
from gircse.runtime.command import comma_separated
from gircse.runtime.precision import Precision

REPEATS = 5
WARM_UP = 2

Mark = Callable[[str], None]


class Timeline:
    """Marks where a part of a run begins; the marks of a GPU are events in its stream."""

    def __init__(self, device: str) -> None:
        """Take a torch device."""
        self._on_gpu = torch.device(device).type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """Let a part begin here, and the one before it end."""
        self._marks.append((part, self._now()))

    def milliseconds(self) -> list[tuple[str, float]]:
        """Wait for the device; return the parts in order, the last mark being the end."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return [
            (part, begin.elapsed_time(end) if self._on_gpu else 1000 * (end - begin))
            for (part, begin), (_, end) in itertools.pairwise(self._marks)
        ]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@torch.inference_mode()
def official_loop(
    model: Any,
    input_ids: Tensor,
    *,
    steps: int,
    temperature: float,
    last_vocabulary: bool,
    mark: Mark = lambda part: None,
) -> Tensor:
    """Run the loop of the official code on prompts without padding.

    Args:
        model: a ``transformers`` causal LM.
        input_ids: (batch, tokens) int64.
        steps: K.
        temperature: T.
        last_vocabulary: make the soft token that nothing reads, as the official code does.
        mark: told where ``decoder`` and ``vocabulary`` of each pass begin, and at the end ``end``.

    Returns:
        (batch, K, hidden): h_1..h_K.
    """
    embeddings = model.get_input_embeddings()
    inputs_embeds, mask, states = embeddings(input_ids), torch.ones_like(input_ids), []
    cache = DynamicCache(config=model.config)
    hook = model.lm_head.register_forward_pre_hook(lambda *_: mark("vocabulary"))
    try:
        for step in range(steps + 1):
            mark("decoder")
            projects = last_vocabulary or step < steps
            outputs = (model if projects else model.model)(
                inputs_embeds=inputs_embeds,
                attention_mask=mask,
                cache=cache,
                output_hidden_states=True,
                use_cache=True,
            )
            states.append(outputs.hidden_states[-1][:, -1:])
            if projects:
                weights = F.softmax(outputs.logits[:, -1] / temperature, dim=-1)
                inputs_embeds = (weights @ embeddings.weight)[:, None]
            mask = F.pad(mask, (0, 1), value=1)
        mark("end")
    finally:
        hook.remove()
    return torch.cat(states[1:], dim=1)


def measure(model: Any, input_ids: Tensor, *, steps: int, temperature: float, last_vocabulary: bool) -> dict[str, Any]:
    """Return medians of repeated runs in milliseconds: the whole, the prompt, and means of a step and a projection."""
    runs = []
    for number in range(WARM_UP + REPEATS):
        timeline = Timeline(str(input_ids.device))
        start = time.perf_counter()
        official_loop(
            model,
            input_ids,
            steps=steps,
            temperature=temperature,
            last_vocabulary=last_vocabulary,
            mark=timeline.mark,
        )
        parts = timeline.milliseconds()
        if number >= WARM_UP:
            runs.append({"total": 1000 * (time.perf_counter() - start), **summary(parts)})
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def summary(parts: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return the first ``decoder`` as ``prompt``, the first ``vocabulary`` likewise, and the means of those after."""
    found = {}
    for part, first, later in (("decoder", "prompt", "step"), ("vocabulary", "prompt vocabulary", "step vocabulary")):
        lengths = [length for name, length in parts if name == part]
        if lengths:
            found[first] = lengths[0]
        if lengths[1:]:
            found[later] = statistics.fmean(lengths[1:])
    return found


def measurements(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Load the model, and yield one measurement after the other."""
    manifest = Bundle.open(args.bundle).manifest
    checkpoint = source_checkpoint(manifest, model=args.model, adapter=args.adapter)
    model = load_reference(checkpoint, device=args.device, precision=Precision(args.dtype))
    draw = torch.Generator().manual_seed(0)
    for batch in args.batch:
        for tokens in args.tokens:
            ids = torch.randint(manifest.graph.vocab_size, (batch, tokens), generator=draw).to(args.device)
            for last_vocabulary in (True, False):
                times = measure(
                    model,
                    ids,
                    steps=args.steps,
                    temperature=manifest.graph.temperature,
                    last_vocabulary=last_vocabulary,
                )
                yield {
                    "batch": batch,
                    "tokens": tokens,
                    "steps": args.steps,
                    "dtype": args.dtype,
                    "last_vocabulary": last_vocabulary,
                    "milliseconds": times,
                }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", help="where the bundle's checkpoint is now")
    parser.add_argument("--adapter", help="where its adapter is now")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="fp16", choices=("fp32", "fp16", "bf16"))
    parser.add_argument("--batch", type=comma_separated(int), default=(1, 8, 32), metavar="N,...")
    parser.add_argument("--tokens", type=comma_separated(int), default=(24, 128), metavar="N,...")
    parser.add_argument("--steps", type=int, default=8, metavar="K")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON")
    args = parser.parse_args(argv)
    found = []
    for entry in measurements(args):
        found.append(entry)
        print(json.dumps(entry), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_files({args.output.name: json.dumps(found, indent=1).encode()}, args.output.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
