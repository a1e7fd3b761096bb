"""Golden vectors: a dozen texts with their token ids and step embeddings from the PyTorch reference.

A bundle carries them so that any runtime, anywhere, can check itself (``Embedder.self_test``).
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from gircse.runtime.batch_planner import TokenBatch, pad_batch
from gircse.runtime.manifest import Pooling
from gircse.runtime.numerics import Float32, l2_normalize, pool_states
from gircse.runtime.tokenization import PromptTokenizer

INSTRUCTION = "Given a question, retrieve passages that answer it"

CASES: tuple[tuple[str, str], ...] = (
    ("", "ok"),
    ("", "The harbour freezes over by late November."),
    ("", "By the end of November there is ice in the port."),
    (INSTRUCTION, "how long does a passport renewal take"),
    ("", "Renewing a passport usually takes three weeks, or two days with the express service."),
    ("", "SELECT name, COUNT(*) FROM orders GROUP BY name HAVING COUNT(*) > 3;"),
    ("", ""),
    ("", "Der Zug nach Köln fährt heute von Gleis 9 ab."),
    ("", "東京は日本の首都です。"),
    ("", "🚲 + ☔ = “not today”"),
    (INSTRUCTION, "why do leaves change colour in autumn?"),
    (
        "",
        "As days shorten, trees stop making chlorophyll, the green pigment that feeds them. What is left shows the "
        "yellow and orange carotenoids that were there all summer, while sugars trapped in the leaves of maples and "
        "oaks turn into red anthocyanins; a dry, sunny autumn with cool nights makes the strongest colours.",
    ),
)


def golden_batch(tokenizer: PromptTokenizer) -> TokenBatch:
    """Return the token ids of the cases, as one batch in their order."""
    token_ids = [ids for instruction, text in CASES for ids in tokenizer.tokenize([text], instruction=instruction)[0]]
    return pad_batch(tuple(range(len(CASES))), token_ids, pad_token_id=tokenizer.pad_token_id)


def write_golden(directory: Path, batch: TokenBatch, states: Float32, pooling: Pooling) -> None:
    """Write golden.json and golden.safetensors.

    golden.json: ``cases``, each with ``instruction``, ``text`` and ``token_ids``. golden.safetensors:
    ``prompt_embedding`` (n, hidden) and ``step_embeddings`` (n, K, hidden), float32, in the order of the cases.

    Args:
        directory: where to write.
        batch: of ``golden_batch``.
        states: (n, K + 1, hidden) float32, h_0..h_K of the reference.
        pooling: of the vectors.
    """
    cases = [
        {"instruction": instruction, "text": text, "token_ids": ids[mask.astype(bool)].tolist()}
        for (instruction, text), ids, mask in zip(CASES, batch.input_ids, batch.attention_mask, strict=True)
    ]
    text = json.dumps({"cases": cases}, indent=1, ensure_ascii=False) + "\n"
    (directory / "golden.json").write_text(text, encoding="utf-8")
    vectors_of_steps = l2_normalize(pool_states(states, pooling))
    vectors = {
        "prompt_embedding": np.ascontiguousarray(vectors_of_steps[:, 0]),
        "step_embeddings": np.ascontiguousarray(vectors_of_steps[:, 1:]),
    }
    # Not save_file, whose files only their owner can read.
    (directory / "golden.safetensors").write_bytes(save(vectors))
