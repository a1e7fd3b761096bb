import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.small_models import SmallModels, add_stepwise_variants, edit_manifest
from support.tolerances import BATCH_MAX_DIFFERENCE

from gircse.runtime import BundleError, Embedder, ProviderError, SelfTestReport
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.ort_session import StepwiseSession, load_graph
from gircse.runtime.precision import SPECS, Precision

TEXTS = [
    "where: what came | what was expected | what to do",
    "ok",
    "",
    "a text may be long or short, and its vector is its own",
    "ünïcödé 😀",
    "a bundle appears whole or not at all " * 2,
    "ok",
]


@pytest.fixture(scope="module", params=["unrolled", "stepwise"])
def embedder(request: pytest.FixtureRequest, small_models: SmallModels) -> Embedder:
    return Embedder(small_models.bundle("qwen2", layout=request.param), threads=2)


def test_vectors_are_unit_float32_in_input_order(embedder: Embedder) -> None:
    vectors = embedder.encode(TEXTS)
    assert vectors.shape == (7, 48)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    alone = np.concatenate([embedder.encode([text]) for text in TEXTS])
    assert np.abs(vectors - alone).max() < BATCH_MAX_DIFFERENCE
    assert np.abs(vectors[0] - vectors[3]).max() > 0.01  # different texts, different vectors


@pytest.mark.parametrize(("batch_size", "batch_tokens"), [(1, 9999), (2, 9999), (99, 40), (99, 1)])
def test_batching_changes_nothing(embedder: Embedder, batch_size: int, batch_tokens: int) -> None:
    wanted = embedder.encode(TEXTS)
    ours = embedder.encode(TEXTS, batch_size=batch_size, batch_tokens=batch_tokens)
    assert np.abs(wanted - ours).max() < BATCH_MAX_DIFFERENCE


def test_any_number_of_steps(embedder: Embedder) -> None:
    every = embedder.encode(TEXTS, all_steps=True)
    assert every.shape == (7, 5, 48)
    for steps in range(1, 6):
        np.testing.assert_allclose(embedder.encode(TEXTS, steps=steps), every[:, steps - 1], atol=1e-6)
    np.testing.assert_allclose(embedder.encode(TEXTS, steps=2, all_steps=True), every[:, :2], atol=1e-6)
    assert np.abs(embedder.encode(TEXTS, steps=0) - every[:, 0]).max() > 0.01
    assert embedder.encode(TEXTS, steps=0, all_steps=True).shape == (7, 0, 48)


def test_instruction_is_the_prompt_template(embedder: Embedder) -> None:
    with_instruction = embedder.encode(["ok"], instruction="Find")
    by_hand = embedder.encode(["Instruct: Find\nQuery:ok"])
    np.testing.assert_array_equal(with_instruction, by_hand)
    assert np.abs(with_instruction - embedder.encode(["ok"])).max() > 0.01


def test_arguments_of_sentence_transformers(embedder: Embedder) -> None:
    wanted = embedder.encode(["query: ok"])
    np.testing.assert_array_equal(
        embedder.encode(["ok"], prompt="query: ", convert_to_numpy=True, normalize_embeddings=True), wanted
    )
    with pytest.raises(ValueError, match=r"instruction 'Find' and prompt 'query: ' \| one of them"):
        embedder.encode(["ok"], prompt="query: ", instruction="Find")
    for name in ("convert_to_numpy", "normalize_embeddings"):
        with pytest.raises(ValueError, match=f"{name} False"):
            embedder.encode(["ok"], **{name: False})


def test_batches_of_token_ids(embedder: Embedder) -> None:
    token_ids = embedder.tokenizer(TEXTS, instruction="Find")
    wanted = embedder.encode(TEXTS, instruction="Find", all_steps=True)
    seen = []
    for rows, outputs in embedder.run_batches(token_ids, batch_size=3):
        np.testing.assert_array_equal(np.shape(outputs.prompt_embedding), (len(rows), 48))
        assert np.abs(outputs.step_embeddings - wanted[list(rows)]).max() < BATCH_MAX_DIFFERENCE
        seen += rows
    assert sorted(seen) == list(range(7))
    with pytest.raises(ValueError, match="steps: 6"):
        next(embedder.run_batches(token_ids, steps=6))


def test_empty_inputs(embedder: Embedder) -> None:
    assert embedder.encode([]).shape == (0, 48)
    assert embedder.encode([], all_steps=True).shape == (0, 5, 48)
    # an empty text is the padding token alone, <|end|>, id 0
    np.testing.assert_allclose(embedder.encode([""]), embedder.encode(["<|end|>"]), atol=1e-7)


def test_truncation_is_reported(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    long = "word " * 200
    with caplog.at_level(logging.WARNING):
        vectors = embedder.encode([long, "ok", long + "more"])
    assert "2 of 3 texts were cut to 48 tokens" in caplog.text
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)  # they differ only beyond the cut
    with pytest.raises(ValueError, match=r"texts\[0\]: \d+ tokens \(2 texts are too long\)"):
        embedder.encode([long, "ok", long], on_overflow="error")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"steps": 6}, r"steps: 6 \| this bundle has 0\.\.5"),
        ({"steps": -1}, r"steps: -1"),
        ({"batch_size": 0}, r"batch_size 0"),
        ({"batch_tokens": 0}, r"batch_tokens 0"),
        ({"on_overflow": "drop"}, r"'drop' is not a valid Overflow"),
        ({"instruction": "\ud800"}, r"instruction: .*surrogates"),
    ],
)
def test_bad_arguments(embedder: Embedder, arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        embedder.encode(["ok"], **arguments)


def test_threads_share_one_embedder(embedder: Embedder) -> None:
    wanted = embedder.encode(TEXTS, all_steps=True)
    with ThreadPoolExecutor(8) as pool:
        for ours in pool.map(lambda _: embedder.encode(TEXTS, all_steps=True), range(24)):
            assert np.abs(ours - wanted).max() < BATCH_MAX_DIFFERENCE


def test_layouts_agree(small_models: SmallModels) -> None:
    unrolled, stepwise = (Embedder(small_models.bundle("qwen2", layout=layout)) for layout in ("unrolled", "stepwise"))
    difference = unrolled.encode(TEXTS, all_steps=True) - stepwise.encode(TEXTS, all_steps=True)
    assert np.abs(difference).max() < BATCH_MAX_DIFFERENCE


def test_self_test_fails_on_wrong_weights(small_bundle: Path) -> None:
    """The self-test must notice a bundle whose vectors are not the reference's."""
    path = small_bundle / "fp32" / "weights.bin"
    weights = np.fromfile(path, np.float32)
    weights[: len(weights) // 2] *= 1.05
    weights.tofile(path)
    report = Embedder(small_bundle, verify=False).self_test()
    assert not report.passed
    assert report.min_cosine < SPECS[Precision.FP32].self_test_min_cosine


def test_a_variant_without_the_unrolled_graph_runs_stepwise(small_models: SmallModels, small_bundle: Path) -> None:
    add_stepwise_variants(small_bundle, "int8")
    wanted = Embedder(small_models.bundle("qwen2"), layout="stepwise").encode(TEXTS, all_steps=True)
    embedder = Embedder(small_bundle, precision="int8")
    np.testing.assert_array_equal(embedder.encode(TEXTS, all_steps=True), wanted)
    assert embedder.self_test().limit == SPECS[Precision.INT8].self_test_min_cosine
    with pytest.raises(BundleError, match=r"int8: layout unrolled \| it has stepwise"):
        Embedder(small_bundle, precision="int8", layout="unrolled")


def test_the_cpu_runs_without_a_binding_and_gets_the_same_bits(small_models: SmallModels) -> None:
    """A binding for each of the many cache tensors costs more; it stays the way of a GPU, and is as good here."""

    class Bound(StepwiseSession):
        _run_on_cpu = StepwiseSession._run_on_device

    bundle = Bundle.open(small_models.bundle("llama", precisions=("fp32", "fp16")))
    facts = bundle.manifest.graph
    draw = np.random.default_rng(0)
    input_ids = draw.integers(1, facts.vocab_size, (3, 12))
    mask = np.tril(np.ones((12, 12), np.int64))[[11, 4, 0], ::-1]  # left padding
    for precision in bundle.manifest.variants:
        graph = load_graph(bundle.graph(precision, Layout.STEPWISE), threads=1)
        for steps in (0, 1, facts.steps):
            ours, theirs = (kind(graph, facts).run(input_ids, mask, steps=steps) for kind in (StepwiseSession, Bound))
            np.testing.assert_array_equal(ours.prompt_embedding, theirs.prompt_embedding)
            np.testing.assert_array_equal(ours.step_embeddings, theirs.step_embeddings)


def test_self_test_does_not_pass_nan() -> None:
    assert not SelfTestReport(1, float("nan"), 0.0, limit=0.9).passed


def test_self_test_without_golden_vectors(small_bundle: Path) -> None:
    edit_manifest(small_bundle, lambda m: m.update(golden=False, golden_missing_reason="no memory"))
    with pytest.raises(BundleError, match=r"no golden vectors \(no memory\)"):
        Embedder(small_bundle).self_test()


def test_providers_and_threads_are_checked(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProviderError, match="provider 'coreml': unknown"):
        Embedder(small_bundle, provider="coreml")
    with pytest.raises(ProviderError, match=r"provider cuda: this onnxruntime has .*CPUExecutionProvider \| CUDA"):
        Embedder(small_bundle, provider="cuda")
    with pytest.raises(ValueError, match="threads: 0"):
        Embedder(small_bundle, threads=0)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match=r"pip install 'gircse-deploy\[cpu\]'"):
        Embedder(small_bundle)
