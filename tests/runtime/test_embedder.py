import inspect
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from support.small_models import SmallModels, add_stepwise_variants
from support.tolerances import BATCH_MAX_DIFFERENCE

from gircse.runtime import BundleError, Embedder, OptionError, ProviderError
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.open_arguments import OpenArguments
from gircse.runtime.ort_session import open_session
from gircse.runtime.precision import SPECS, Precision
from gircse.runtime.provider import Provider

TEXTS = [
    "input_ids has shape (33, 512); the engine takes batch 1..32.",
    "ok",
    "",
    "a text may be long or short, and its vector is its own",
    "ünïcödé 😀",
    "a bundle is written atomically " * 2,
    "ok",
]


@pytest.fixture(scope="module", params=["unrolled", "stepwise"])
def embedder(request: pytest.FixtureRequest, small_models: SmallModels) -> Embedder:
    return Embedder(small_models.bundle("qwen2"), layout=request.param, threads=2)


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
    np.testing.assert_allclose(with_instruction, by_hand, atol=1e-5)  # the stepwise one computes the instruction apart
    assert np.abs(with_instruction - embedder.encode(["ok"])).max() > 0.01


def test_batches_of_token_ids(embedder: Embedder) -> None:
    token_ids = embedder.tokenizer(TEXTS, instruction="Find")
    wanted = embedder.encode(TEXTS, instruction="Find", all_steps=True)
    seen = []
    for rows, outputs in embedder.run_batches(token_ids, batch_size=3):
        np.testing.assert_array_equal(np.shape(outputs.prompt_embedding), (len(rows), 48))
        assert np.abs(outputs.step_embeddings - wanted[list(rows)]).max() < BATCH_MAX_DIFFERENCE
        seen += rows
    assert sorted(seen) == list(range(7))
    with pytest.raises(OptionError, match=r"^steps is 6; this bundle has 0 to 5"):
        next(embedder.run_batches(token_ids, steps=6))


def test_one_batch_of_token_ids_is_in_their_order(embedder: Embedder) -> None:
    token_ids = embedder.tokenizer(TEXTS)
    outputs = embedder.run_batch(token_ids, steps=3)
    assert (
        np.abs(outputs.step_embeddings - embedder.encode(TEXTS, steps=3, all_steps=True)).max() < BATCH_MAX_DIFFERENCE
    )
    with pytest.raises(OptionError, match=r"^token_ids is empty; a batch has at least one text\."):
        embedder.run_batch([])
    with pytest.raises(OptionError, match=r"^steps is 6; this bundle has 0 to 5"):
        embedder.run_batch(token_ids, steps=6)


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
    with pytest.raises(OptionError, match=r"^texts\[0\] has \d+ tokens, and 1 more of these 3 texts are too long; "):
        embedder.encode([long, "ok", long], on_overflow="error")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"steps": 6}, r"steps is 6; this bundle has 0 to 5\. Choose one of these, or export with --steps 6$"),
        ({"steps": 65}, r"steps is 65; this bundle has 0 to 5\. Choose one of these\.$"),
        ({"steps": -1}, r"steps is -1; .* Choose one of these\.$"),
        ({"batch_size": 0}, r"batch_size is 0; it has to be at least 1\."),
        ({"batch_tokens": 0}, r"batch_tokens is 0; it has to be at least 1\."),
        ({"on_overflow": "drop"}, r"on_overflow is 'drop'; it has to be one of truncate, error\."),
        ({"instruction": "\ud800"}, r"instruction cannot be encoded as UTF-8: .*surrogates"),
        ({"prompt": "\ud800"}, r"prompt cannot be encoded as UTF-8: .*surrogates"),
        ({"prompt": "query: ", "instruction": "Find"}, r"instruction is 'Find' and prompt is 'query: '; only one"),
    ],
)
def test_bad_arguments(embedder: Embedder, arguments: dict[str, object], match: str) -> None:
    for texts in (["ok"], "ok", []):
        with pytest.raises(OptionError, match=f"^{match}"):
            embedder.encode(texts, **arguments)
    with pytest.raises(OptionError, match=f"^{match}"):
        embedder.encode_iter(["ok"], **arguments)  # at once, not with the first window


def test_threads_share_one_embedder(embedder: Embedder) -> None:
    wanted = embedder.encode(TEXTS, all_steps=True)
    with ThreadPoolExecutor(8) as pool:
        for ours in pool.map(lambda _: embedder.encode(TEXTS, all_steps=True), range(24)):
            assert np.abs(ours - wanted).max() < BATCH_MAX_DIFFERENCE


def test_layouts_agree(small_models: SmallModels) -> None:
    unrolled, stepwise = (Embedder(small_models.bundle("qwen2"), layout=layout) for layout in ("unrolled", "stepwise"))
    difference = unrolled.encode(TEXTS, all_steps=True) - stepwise.encode(TEXTS, all_steps=True)
    assert np.abs(difference).max() < BATCH_MAX_DIFFERENCE


def test_a_variant_without_the_unrolled_graph_runs_stepwise(small_models: SmallModels, small_bundle: Path) -> None:
    add_stepwise_variants(small_bundle, "int8")
    wanted = Embedder(small_models.bundle("qwen2"), layout="stepwise").encode(TEXTS, all_steps=True)
    embedder = Embedder(small_bundle, precision="int8")
    np.testing.assert_array_equal(embedder.encode(TEXTS, all_steps=True), wanted)
    assert embedder.self_test().limit == SPECS[Precision.INT8].self_test_min_cosine
    with pytest.raises(BundleError, match=r"int8, has no unrolled graph; it has stepwise\."):
        Embedder(small_bundle, precision="int8", layout="unrolled")


def test_providers_and_threads_are_checked(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"^provider is 'coreml'; it has to be one of auto, cpu, cuda, "):
        Embedder(small_bundle, provider="coreml")
    with pytest.raises(OptionError, match=r"^layout is 'rolled'; it has to be one of unrolled, stepwise\.$"):
        Embedder(small_bundle, layout="rolled")
    with pytest.raises(
        ProviderError, match=r"^provider cuda needs CUDA\w+; this onnxruntime has .*CPUExecutionProvider"
    ):
        Embedder(small_bundle, provider="cuda")
    with pytest.raises(OptionError, match=r"^threads is 0; it has to be at least 1\."):
        Embedder(small_bundle, threads=0)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match=r"pip install 'gircse-deploy\[cpu\]'"):
        Embedder(small_bundle)


def test_one_text_gives_one_vector(embedder: Embedder) -> None:
    wanted = embedder.encode(["ok"], all_steps=True)
    for text in ("ok", np.str_("ok")):
        np.testing.assert_array_equal(embedder.encode(text), wanted[0, -1])
        np.testing.assert_array_equal(embedder.encode(text, all_steps=True), wanted[0])


def test_texts_come_in_any_iterable(embedder: Embedder) -> None:
    wanted = embedder.encode(TEXTS)
    for texts in (tuple(TEXTS), iter(TEXTS), (text for text in TEXTS), np.array(TEXTS), np.array(TEXTS, dtype=object)):
        np.testing.assert_array_equal(embedder.encode(texts), wanted)
    for wrong in ({"title": "ok"}, {"ok"}, b"ok", None, [None], np.array("ok"), np.array([["ok"]])):
        for method in (embedder.encode, embedder.encode_query, lambda texts: list(embedder.encode_iter(texts))):
            with pytest.raises(TypeError, match=r"^texts"):
                method(wrong)


def test_queries_and_documents(small_models: SmallModels) -> None:
    embedder = Embedder(small_models.bundle("qwen2", query_instruction="Find"))
    with_instruction, plain = embedder.encode(["ok"], instruction="Find"), embedder.encode(["ok"])
    assert np.abs(with_instruction - plain).max() > 0.01
    for vectors, wanted in [
        (embedder.encode_query(["ok"]), with_instruction),
        (embedder.encode_query("ok"), with_instruction[0]),
        (embedder.encode_query(["ok"], prompt_name=None), with_instruction),
        (embedder.encode_query(["ok"], steps=2), embedder.encode(["ok"], instruction="Find", steps=2)),
        (embedder.encode_query(["ok"], instruction="Other"), embedder.encode(["ok"], instruction="Other")),
        (embedder.encode_query(["ok"], instruction=""), plain),
        (embedder.encode_query(["ok"], prompt="query: "), embedder.encode(["query: ok"])),
        (embedder.encode_document(["ok"]), plain),
        (embedder.encode_document(["ok"], instruction="Find"), with_instruction),
        (next(embedder.encode_iter(["ok"], prompt_name="query")), with_instruction),
    ]:
        np.testing.assert_array_equal(vectors, wanted)
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        embedder.encode_query(["ok"], batchsize=3)


def test_without_a_query_instruction_queries_are_embedded_as_they_are(embedder: Embedder) -> None:
    np.testing.assert_array_equal(embedder.encode_query(TEXTS), embedder.encode(TEXTS))


def test_facts_of_the_bundle(embedder: Embedder) -> None:
    assert (embedder.embedding_dimension, embedder.max_tokens, embedder.steps) == (48, 48, 5)
    assert embedder.get_sentence_embedding_dimension() == 48


def test_a_closed_embedder_says_so(small_models: SmallModels) -> None:
    with Embedder(small_models.bundle("qwen2"), threads=1) as embedder:
        assert embedder.encode("ok").shape == (48,)
        windows = embedder.encode_iter(TEXTS, window=2)
        next(windows)
    embedder.close()  # again
    for use in (
        lambda: embedder.encode("ok"),
        lambda: embedder.encode_iter(["ok"]),
        embedder.self_test,
        windows.__next__,
    ):
        with pytest.raises(OptionError, match=r"^embedder is closed\. Open the bundle again"):
            use()
    assert embedder.embedding_dimension == 48  # what the manifest says is still there


def test_a_pickle_opens_the_bundle_again(embedder: Embedder, small_models: SmallModels) -> None:
    pickled = pickle.dumps(embedder)
    assert len(pickled) < 1000  # a path, not a session
    with pickle.loads(pickled) as again:
        assert (again.path, again.arguments) == (embedder.path, embedder.arguments)
        assert again.arguments["layout"] == embedder.arguments["layout"]
        np.testing.assert_array_equal(again.encode(TEXTS), embedder.encode(TEXTS))
    bundle = Bundle.open(small_models.bundle("qwen2"))
    with (
        Embedder.from_session(bundle, open_session(bundle, "fp32", threads=1), precision="fp32") as opened,
        pytest.raises(TypeError, match=r"embedder cannot be pickled; it was made from an open session"),
    ):
        pickle.dumps(opened)


def test_arguments_are_every_keyword_of_an_embedder_and_fit_into_json(small_models: SmallModels) -> None:
    keywords = inspect.getfullargspec(Embedder.__init__).kwonlyargs
    assert list(get_type_hints(OpenArguments)) == keywords
    path = small_models.bundle("qwen2")
    with Embedder(path, provider=Provider.CPU, layout=Layout.STEPWISE, precision="fp32", threads=1) as embedder:
        assert list(embedder.arguments) == keywords
        assert embedder.path == str(path)
        assert {type(value) for value in embedder.arguments.values()} == {str, int, bool, type(None)}


def test_an_embedder_on_an_open_session(small_models: SmallModels) -> None:
    bundle = Bundle.open(small_models.bundle("qwen2"))
    session = open_session(bundle, "fp32", threads=2)
    with Embedder.from_session(bundle, session, precision="fp32") as embedder:
        wanted = Embedder(bundle.directory, threads=2).encode(TEXTS)
        np.testing.assert_array_equal(embedder.encode(TEXTS), wanted)
        assert (embedder.provider, embedder.precision) == ("cpu", "fp32")
    with pytest.raises(OptionError, match="session is closed"):
        session.run(np.ones((1, 3), np.int64), np.ones((1, 3), np.int64), steps=1)
