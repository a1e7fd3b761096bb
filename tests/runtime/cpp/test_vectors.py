"""The C++ runtime gives the vectors of the Python runtime, to the last bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cpp_library import CppEmbedder, CppLibrary
from support.int8_bundles import int8_bundle
from support.small_models import SmallModels, edit_manifest, scale_weights

from gircse.runtime import Embedder

TEXTS = [
    "input_ids has shape (33, 512); the engine takes batch 1..32.",
    "ok",
    "",
    "ünïcödé 😀 e\u0301 \u1100\u1161",
    "a NUL \0 inside",
    "a bundle is written atomically " * 20,
    "{text} and {instruction} are text",
    "ok",
]
PROMPTS: list[dict[str, Any]] = [
    {},
    {"instruction": "Find the {text} that answers {instruction}"},
    {"prompt": "query: "},
    {"prompt": ""},
]
RUNS: list[dict[str, Any]] = [
    {"all_steps": True},
    *({"steps": steps} for steps in range(6)),
    {"steps": 2, "all_steps": True},
    {"steps": 0, "all_steps": True},
    {"batch_size": 1},
    {"batch_size": 3},
    {"batch_tokens": 60},
    {"batch_tokens": 1},
]
LEFT_AND_SUFFIX = {"truncation_side": "left", "prompt_suffix": "<|endoftext|>", "golden": False}

Make = Callable[[SmallModels, Path], Path]


def edited(models: SmallModels, folder: Path) -> Path:
    bundle = folder / "edited"
    shutil.copytree(models.bundle("qwen2"), bundle)
    edit_manifest(bundle, lambda manifest: manifest.update(LEFT_AND_SUFFIX))
    return bundle


BUNDLES: dict[str, Make] = {
    **{
        name: lambda models, folder, name=name: models.bundle(name)  # type: ignore[misc]
        for name in ("llama", "qwen2", "qwen3-biased", "mistral-window", "gemma3-softcap-linear", "phi4-mini")
    },
    "last": lambda models, folder: models.bundle("qwen2", pooling="last"),
    "no steps": lambda models, folder: models.bundle("qwen2", steps=0),
    "no steps, stepwise": lambda models, folder: models.bundle("qwen2", steps=0, layout="stepwise"),
    "no unrolled": lambda models, folder: models.bundle("qwen2", layout="stepwise"),
    "left and suffix": edited,
    "weights in several files": lambda models, folder: models.bundle("qwen2", max_shard_bytes=256 << 10),
    "fp16": lambda models, folder: models.bundle("qwen2", precisions=("fp32", "fp16")),
    "int8": lambda models, folder: int8_bundle(models, "qwen2"),
}


@pytest.fixture(scope="module")
def library(cpp_library: Path, onnxruntime_library: Path) -> CppLibrary:
    return CppLibrary(cpp_library, onnxruntime_library)


@pytest.fixture(scope="module", params=BUNDLES)
def bundle(request: pytest.FixtureRequest, small_models: SmallModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BUNDLES[request.param](small_models, tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def subject(library: CppLibrary, small_models: SmallModels) -> CppEmbedder:
    return library.open(small_models.bundle("qwen2"))


@pytest.fixture(scope="module")
def python(small_models: SmallModels) -> Embedder:
    return Embedder(small_models.bundle("qwen2"), provider="cpu")


def graphs(bundle: Path) -> list[tuple[str, str]]:
    """Return every precision of a bundle in every layout that it has."""
    with Embedder(bundle, provider="cpu", verify=False) as embedder:
        variants = embedder.manifest.variants.items()
    return [(precision, layout) for precision, variant in variants for layout in variant.graphs]


def test_every_graph_gives_the_same_bits(library: CppLibrary, bundle: Path) -> None:
    for precision, layout in graphs(bundle):
        chosen: dict[str, Any] = {"precision": precision, "layout": layout, "provider": "cpu", "threads": 1}
        with library.open(bundle, **chosen) as ours, Embedder(bundle, **chosen) as theirs:
            for options in [*PROMPTS, *RUNS]:
                if options.get("steps", 0) > theirs.steps:
                    continue
                expected = theirs.encode(TEXTS, **options)
                np.testing.assert_array_equal(ours.encode(TEXTS, **options), expected, f"{chosen} {options}")
            _, cut = theirs.tokenizer.tokenize(TEXTS)
            assert (ours.truncated, len(cut)) == (1, 1)
            for text in TEXTS[:4]:  # one by one, with what earlier calls left of this instruction or of another
                for instruction in (PROMPTS[1]["instruction"], "Find it"):
                    alone = theirs.encode([text], instruction=instruction)
                    np.testing.assert_array_equal(ours.encode([text], instruction=instruction), alone, f"{chosen}")


@pytest.mark.parametrize("streams", [1, 2, 5])
def test_batches_and_streams_are_those_of_python(library: CppLibrary, small_models: SmallModels, streams: int) -> None:
    """In INT8 a text has the same bits only in the same batch."""
    texts = ["word " * (number * 7919 % 43) for number in range(60)]
    chosen: dict[str, Any] = {"precision": "int8", "provider": "cpu", "threads": 1, "streams": streams}
    bundle = int8_bundle(small_models, "qwen2")
    with library.open(bundle, **chosen) as ours, Embedder(bundle, **chosen) as theirs:
        for options in ({}, {"steps": 0}, {"batch_size": 9}, {"batch_tokens": 200}, {"instruction": "Find it"}):
            np.testing.assert_array_equal(ours.encode(texts, **options), theirs.encode(texts, **options), str(options))


def test_every_graph_passes_the_same_self_test(library: CppLibrary, bundle: Path) -> None:
    for precision, layout in graphs(bundle):
        chosen: dict[str, Any] = {"precision": precision, "layout": layout, "provider": "cpu", "threads": 1}
        with library.open(bundle, **chosen) as ours, Embedder(bundle, **chosen) as theirs:
            if theirs.manifest.golden:
                assert_same_report(ours, theirs)


def test_a_graph_that_fails_fails_at_the_same_step(library: CppLibrary, small_bundle: Path) -> None:
    scale_weights(small_bundle, 0.4, 0.5, 1.5)
    with library.open(small_bundle) as ours, Embedder(small_bundle, provider="cpu") as theirs:
        assert not theirs.self_test().passed
        assert_same_report(ours, theirs)


def assert_same_report(ours: CppEmbedder, theirs: Embedder) -> None:
    found, expected = ours.self_test(), theirs.self_test()
    assert found.min_cosine == pytest.approx(expected.min_cosine, abs=1e-12)  # the same vectors, summed otherwise
    assert bool(found.passed) is expected.passed
    for name in ("texts", "limit", "max_difference", "worst_step", "worst_text"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_bundle_has_the_same_tokens(library: CppLibrary, bundle: Path, prompt: dict[str, Any]) -> None:
    with library.open(bundle, provider="cpu") as ours, Embedder(bundle, provider="cpu") as theirs:
        token_ids, cut = theirs.tokenizer.tokenize(TEXTS, **prompt)
        assert (ours.tokenize(TEXTS, **prompt), ours.truncated) == (token_ids, len(cut))


def test_tokens_give_the_vectors_of_their_texts(subject: CppEmbedder, python: Embedder) -> None:
    for run in RUNS:
        vectors = subject.encode_tokens(subject.tokenize(TEXTS), **run)
        np.testing.assert_array_equal(vectors, python.encode(TEXTS, **run))


def test_no_text_gives_no_vector(subject: CppEmbedder) -> None:
    assert subject.encode([]).shape == (0, 48)
    assert subject.encode([], all_steps=True).shape == (0, 5, 48)
    assert subject.encode_tokens([]).shape == (0, 48)
    assert subject.tokenize([]) == []


def test_a_text_of_five_megabytes_is_cut(subject: CppEmbedder, python: Embedder) -> None:
    text = "the small bird sings of ships\n" * 175_000
    assert len(text) > 5_000_000
    np.testing.assert_array_equal(subject.encode([text]), python.encode([text]))
    assert subject.truncated == 1


def test_a_bundle_is_described(library: CppLibrary, small_models: SmallModels) -> None:
    bundle = small_models.bundle("qwen2", query_instruction="Find it ünïcödé", precisions=("fp32", "fp16"))
    with library.open(bundle, precision="fp16", provider="cpu") as subject:
        found = subject.description
        assert (found.dimension, found.steps, found.max_tokens) == (48, 5, 48)
        assert (found.precision, found.provider, found.layout) == (b"fp16", b"cpu", b"stepwise")
        assert (found.query_instruction.decode(), found.skipped) == ("Find it ünïcödé", b"")
        assert library.onnxruntime is not None
        assert library.onnxruntime.name == f"libonnxruntime.so.{found.onnxruntime.decode()}"


def test_auto_takes_the_cpu_and_says_why(library: CppLibrary, small_models: SmallModels) -> None:
    with library.open(small_models.bundle("qwen2")) as subject:
        assert subject.description.provider == b"cpu"
        assert subject.description.skipped.startswith(b"provider cuda needs CUDAExecutionProvider; ")


def test_fp32_and_stepwise_are_the_defaults_of_the_cpu(library: CppLibrary, small_models: SmallModels) -> None:
    with library.open(small_models.bundle("qwen2", precisions=("fp16", "fp32"))) as subject:
        assert (subject.description.precision, subject.description.layout) == (b"fp32", b"stepwise")
    with library.open(small_models.bundle("qwen2", steps=0)) as subject:
        assert subject.description.layout == b"unrolled"  # without steps there is no other
