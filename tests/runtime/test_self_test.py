"""The self-test: what passes, what fails, and what there is to compare with."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save
from support.small_models import SmallModels, edit_manifest, rehash

from gircse.runtime import BundleError, Embedder, SelfTestReport
from gircse.runtime.bundle import Bundle
from gircse.runtime.precision import SPECS, Precision
from gircse.runtime.self_test import compare_with_golden, read_golden_vectors


def test_golden_vectors_have_a_row_for_the_prompt_and_every_step(small_models: SmallModels) -> None:
    golden = read_golden_vectors(Bundle.open(small_models.bundle("qwen2")))
    assert golden.vectors.shape == (12, 6, 48)
    assert len(golden.token_ids) == 12
    report = compare_with_golden(golden.vectors, golden.vectors, precision="fp32")
    assert (report.texts, report.max_difference) == (12, 0.0)
    assert report.passed
    shifted = np.roll(golden.vectors, 1, axis=0)  # every text has the vectors of another one
    assert not compare_with_golden(shifted, golden.vectors, precision="fp32").passed


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_the_first_step_that_fails_is_named(small_models: SmallModels, value: float) -> None:
    golden = read_golden_vectors(Bundle.open(small_models.bundle("qwen2"))).vectors
    ours = golden.copy()
    ours[7, 3, :4] = value
    ours[2, 4, :20] = 0.5
    report = compare_with_golden(ours, golden, precision="fp32")
    assert (report.worst_step, report.worst_text, report.passed) == (3, 7, False)


def test_the_smallest_cosine_is_named_where_all_pass(small_models: SmallModels) -> None:
    golden = read_golden_vectors(Bundle.open(small_models.bundle("qwen2"))).vectors
    ours = golden.copy()
    ours[5, 2, 0] += 1e-3
    report = compare_with_golden(ours, golden, precision="fp32")
    assert (report.worst_step, report.worst_text, report.passed) == (2, 5, True)


def test_self_test_fails_on_wrong_weights(small_bundle: Path) -> None:
    """The self-test must notice a bundle whose vectors are not the reference's."""
    path = small_bundle / "fp32" / "weights.bin"
    weights = np.fromfile(path, np.float32)
    weights[: len(weights) // 2] *= 1.05
    weights.tofile(path)
    report = Embedder(small_bundle, verify=False).self_test()
    assert not report.passed
    assert report.min_cosine < SPECS[Precision.FP32].self_test_min_cosine


@pytest.mark.parametrize("text", [0, 5, 11])
def test_the_worst_text_is_numbered_as_in_golden_json(small_bundle: Path, text: int) -> None:
    """The texts run longest first, which is not their order in the file."""
    path = small_bundle / "golden.safetensors"
    tensors = load_file(path)
    tensors["step_embeddings"][text, 1] *= -1
    path.write_bytes(save(tensors))
    report = Embedder(small_bundle, verify=False).self_test()
    assert (report.worst_step, report.worst_text, report.passed) == (2, text, False)


def test_self_test_does_not_pass_nan() -> None:
    assert not SelfTestReport(1, float("nan"), 0.0, 0, 0, limit=0.9).passed


def test_self_test_without_golden_vectors(small_bundle: Path) -> None:
    edit_manifest(small_bundle, lambda m: m.update(golden=False, golden_missing_reason="no memory"))
    with pytest.raises(BundleError, match=r"has no golden vectors \(no memory\)\. Export again"):
        Embedder(small_bundle).self_test()


def test_other_tokens_than_at_the_export_are_refused(small_bundle: Path) -> None:
    edit_manifest(small_bundle, lambda m: m.update(prompt_template="Query: {text}"))
    match = (
        r"gives golden text 4 other tokens than at the export; that was with tokenizers \S+, and \S+ is installed\. "
    )
    with pytest.raises(BundleError, match=match):
        Embedder(small_bundle)
    Embedder(small_bundle, verify=False)  # the user's own choice


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("golden.json", b"[" * 5000, r"golden\.json cannot be read: .* Copy or export the bundle again\."),
        ("golden.json", b'{"cases": []}', r"golden\.json has no text, or one without tokens"),
        (
            "golden.json",
            b'{"cases": [{"instruction": "", "text": "a", "token_ids": [520]}]}',
            r"golden\.json has the token 520; the model has 520 tokens",
        ),
        ("golden.safetensors", b"", r"golden\.safetensors cannot be read: "),
        ("golden.safetensors", save({"step_embeddings": np.zeros((12, 5, 48))}), r"has no prompt_embedding\."),
        (
            "golden.safetensors",
            save({"prompt_embedding": np.zeros((12, 47), np.float32)}),
            r"prompt_embedding has type F32 and shape \(12, 47\); F32 and \(12, 48\) were expected",
        ),
    ],
)
def test_damaged_golden_vectors(small_bundle: Path, name: str, content: bytes, match: str) -> None:
    (small_bundle / name).write_bytes(content)
    rehash(small_bundle)
    with pytest.raises(BundleError, match=match):
        Embedder(small_bundle, verify=False).self_test()
