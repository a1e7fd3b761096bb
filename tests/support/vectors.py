"""The prompts that graphs are compared on: as the runtime embeds them, and as plain torch does."""

from pathlib import Path

import numpy as np
import torch

from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import l2_normalize
from gircse.runtime.ort_session import open_session
from support.reference_loop import plain_embeddings, plain_states

STEPS = 5
PROMPTS = [[17], [5, 300, 44, 44, 260, 9, 101], list(range(30, 60)), [511, 0, 3]]


def padded(prompts: list[list[int]], *, left: bool, extra: int = 2) -> tuple[np.ndarray, np.ndarray]:
    length = max(map(len, prompts)) + extra
    ids = np.full((len(prompts), length), 7, np.int64)  # padding that is a real token: masking has to hide it
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(length - len(prompt), None) if left else slice(0, len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


def expected(model: torch.nn.Module, *, pooling: str = "mean", steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    """Return normalized h_0 (n, hidden) and z_1..z_K (n, K, hidden)."""
    states = [plain_states(model, prompt, steps) for prompt in PROMPTS]
    embeddings = torch.stack([plain_embeddings(rows, pooling) for rows in states])
    return l2_normalize(torch.stack(states)[:, 0].numpy()), embeddings.numpy()


def run(
    bundle: Path, *, layout: Layout | None = None, left: bool = True, steps: int = STEPS
) -> tuple[np.ndarray, np.ndarray]:
    session = open_session(Bundle.open(bundle), "fp32", layout=layout, threads=1)
    return tuple(session.run(*padded(PROMPTS, left=left), steps=steps))
