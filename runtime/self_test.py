"""The self-test: golden vectors of the PyTorch reference, and how far a runtime is from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open

from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import BundleError
from gircse.runtime.manifest import MANIFEST_NAME
from gircse.runtime.numerics import Float32, row_cosine
from gircse.runtime.precision import precision_spec
from gircse.runtime.records import UNREADABLE_JSON
from gircse.runtime.session import StepOutputs
from gircse.runtime.tokenization import PromptTokenizer

_PROMPTS, _VECTORS = "golden.json", "golden.safetensors"
_REMAKE = "Copy or export the bundle again."


class GoldenPrompt(msgspec.Struct, frozen=True):
    """One text of golden.json, with the token ids that the export gave it."""

    instruction: str
    text: str
    token_ids: list[int]


class _GoldenFile(msgspec.Struct, frozen=True):
    """What is read of golden.json; it has no schema version, and what else it holds is not for us."""

    cases: list[GoldenPrompt]


@dataclass(frozen=True)
class GoldenVectors:
    """The golden texts of a bundle.

    Attributes:
        texts: the texts, without their instructions.
        token_ids: of each text.
        vectors: (n, K + 1, hidden) float32, h_0 normalized and z_1..z_K of the reference.
    """

    texts: list[str]
    token_ids: list[list[int]]
    vectors: Float32


@dataclass(frozen=True)
class SelfTestReport:
    """How far the golden texts are from the PyTorch reference, over every text and step.

    Attributes:
        texts: number of golden texts.
        min_cosine: smallest cosine.
        max_difference: largest difference of an element.
        worst_step: the first step with a vector that fails, or the one with the smallest cosine; 0 is the prompt.
        worst_text: number of the text with the smallest cosine in that step, from 0.
        limit: smallest cosine that passes at this precision.
    """

    texts: int
    min_cosine: float
    max_difference: float
    worst_step: int
    worst_text: int
    limit: float

    @property
    def passed(self) -> bool:
        """Whether every vector is within tolerance; NaN fails."""
        return self.min_cosine >= self.limit


def read_golden_vectors(bundle: Bundle) -> GoldenVectors:
    """Read golden.json and golden.safetensors.

    Raises:
        BundleError: the bundle holds no golden vectors, or they are damaged or belong to another bundle.
    """
    if not bundle.manifest.golden:
        raise BundleError(
            str(bundle.directory),
            f"has no golden vectors ({bundle.manifest.golden_missing_reason})",
            None,
            "Export again on a machine where the PyTorch reference can run.",
        )
    prompts = _read_prompts(bundle)
    texts, steps, hidden = len(prompts), bundle.manifest.graph.steps, bundle.manifest.graph.hidden_size
    path = bundle.file(_VECTORS)
    try:
        with safe_open(path, framework="np") as file:
            prompt = _tensor(file, path, "prompt_embedding", (texts, hidden))
            vectors = all_vectors(StepOutputs(prompt, _tensor(file, path, "step_embeddings", (texts, steps, hidden))))
    except (SafetensorError, OSError) as err:
        raise BundleError(str(path), f"cannot be read: {err}", None, _REMAKE) from err
    return GoldenVectors([prompt.text for prompt in prompts], [prompt.token_ids for prompt in prompts], vectors)


def check_golden_tokens(bundle: Bundle, tokenizer: PromptTokenizer) -> None:
    """Compare the token ids of the golden texts here with those of the export; without golden texts do nothing.

    Another version of tokenizers, or a manifest with another prompt template, gives other vectors without an error.

    Raises:
        BundleError: they differ, or golden.json is damaged.
    """
    if not bundle.manifest.golden:
        return
    for number, golden in enumerate(_read_prompts(bundle), start=1):
        (found,), _ = tokenizer.tokenize([golden.text], instruction=golden.instruction)
        if found != golden.token_ids:
            version = bundle.manifest.tools.get("tokenizers", "of an unknown version")
            raise BundleError(
                str(bundle.directory),
                f"gives golden text {number} other tokens than at the export",
                f"that was with tokenizers {version}, and {tokenizers.__version__} is installed",
                f"Install that version; if it is the same, {MANIFEST_NAME} was changed: export the bundle again.",
            )


def compare_with_golden(ours: Float32, golden: Float32, *, precision: str) -> SelfTestReport:
    """Compare (n, K + 1, hidden) float32 vectors, row by row."""
    cosines, limit = row_cosine(ours, golden), precision_spec(precision).self_test_min_cosine
    failed = ~(cosines >= limit).all(0)  # NaN fails
    step = int(failed.argmax() if failed.any() else cosines.min(0).argmin())
    return SelfTestReport(
        texts=len(golden),
        min_cosine=float(cosines.min()),
        max_difference=float(np.abs(ours - golden).max()),
        worst_step=step,
        worst_text=int(cosines[:, step].argmin()),
        limit=limit,
    )


def all_vectors(outputs: StepOutputs) -> Float32:
    """Return h_0 normalized and z_1..z_K as one (batch, K + 1, hidden) float32 array."""
    return np.concatenate([outputs.prompt_embedding[:, None], outputs.step_embeddings], axis=1)


def _read_prompts(bundle: Bundle) -> list[GoldenPrompt]:
    """Read golden.json.

    Raises:
        BundleError: it cannot be read, holds no text, or tokens that the model does not have.
    """
    path, vocabulary = bundle.file(_PROMPTS), range(bundle.manifest.graph.vocab_size)
    try:
        prompts = msgspec.json.decode(path.read_bytes(), type=_GoldenFile).cases
    except (*UNREADABLE_JSON, OSError) as err:
        raise BundleError(str(path), f"cannot be read: {err}", None, _REMAKE) from err
    if not prompts or not all(prompt.token_ids for prompt in prompts):
        raise BundleError(str(path), "has no text, or one without tokens", None, _REMAKE)
    if unknown := {token for prompt in prompts for token in prompt.token_ids if token not in vocabulary}:
        raise BundleError(
            str(path), f"has the token {min(unknown)}", f"the model has {len(vocabulary)} tokens", _REMAKE
        )
    return prompts


def _tensor(file: Any, path: Path, name: str, shape: tuple[int, ...]) -> Float32:
    """Return a float32 tensor of golden.safetensors.

    Raises:
        BundleError: it is missing, or has another type or shape.
        SafetensorError: it cannot be read.
    """
    if name not in file.keys():
        raise BundleError(str(path), f"has no {name}", None, _REMAKE)
    view = file.get_slice(name)
    found = view.get_dtype(), tuple(view.get_shape())
    if found != ("F32", shape):
        raise BundleError(
            f"{path}: {name}", f"has type {found[0]} and shape {found[1]}", f"F32 and {shape} were expected", _REMAKE
        )
    vectors: Float32 = file.get_tensor(name)
    return vectors
