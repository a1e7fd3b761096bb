"""The self-test: golden vectors of the PyTorch reference, and how far a runtime is from them."""

import json
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load_file

from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import BundleError
from gircse.runtime.numerics import Float32, row_cosine
from gircse.runtime.precision import precision_spec
from gircse.runtime.session import StepOutputs


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
        BundleError: the bundle holds no golden vectors.
    """
    if not bundle.manifest.golden:
        raise BundleError(
            str(bundle.directory),
            f"has no golden vectors ({bundle.manifest.golden_missing_reason})",
            None,
            "Export again on a machine where the PyTorch reference can run.",
        )
    cases = json.loads(bundle.file("golden.json").read_text(encoding="utf-8"))["cases"]
    expected = load_file(bundle.file("golden.safetensors"))
    vectors = all_vectors(StepOutputs(expected["prompt_embedding"], expected["step_embeddings"]))
    return GoldenVectors([case["text"] for case in cases], [case["token_ids"] for case in cases], vectors)


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
