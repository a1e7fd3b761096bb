"""mteb itself runs on a bundle, on tasks whose data are made here; no test may open a connection."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from support.small_models import SmallModels
from support.tolerances import BATCH_MAX_DIFFERENCE, CONTROL_MIN_DIFFERENCE, MTEB_SCORE_MAX_DIFFERENCE

mteb = pytest.importorskip("mteb", reason="mteb is not installed (extra 'mteb')")

from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.models import EncoderProtocol, ModelMeta
from mteb.types import PromptType
from scipy.stats import pearsonr, spearmanr
from torch.utils.data import DataLoader

from gircse.evaluation.mteb_encoder import MtebEncoder, model_meta_from_manifest
from gircse.runtime import Embedder, Manifest
from gircse.runtime.manifest import AdapterSource, ModelSource

FIRST = ["the cat sat on the mat", "ok", "how long does it take", "a bundle is whole", "one", "weights of the model"]
SECOND = ["a cat lay on a rug", "no", "when will it be done", "ok", "two words", "what a step costs"]
RATINGS = [4.0, 1.0, 5.0, 0.5, 3.0, 2.0]
QUERIES = {"q-b": "where is the cat", "q-a": "what does it cost", "q-c": "how long"}
TITLES = ["Cats", "", "Prices", "", "Time"]
BODIES = ["A cat is on the mat.", "ok", "Every step costs the same.", "It takes three weeks, or a little more.", "Now."]
CORPUS = ["Cats A cat is on the mat.", BODIES[1], "Prices Every step costs the same.", BODIES[3], "Time Now."]
RELEVANT = {"q-b": {"d0": 1}, "q-a": {"d2": 2, "d1": 1}, "q-c": {"d3": 1, "d4": 1}}
LABELS = [0, 1, 0, 1, 0, 1]

STS_PROMPT = "Find text of the same meaning"
RETRIEVAL_PROMPT = "Find what answers the question"
CLASSIFICATION_PROMPT = "Classify the text"


def metadata(name: str, task_type: str, main_score: str, prompt: Any) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        description="Made in memory.",
        type=task_type,
        category="t2t",
        dataset={"path": "not/there", "revision": "0"},
        eval_langs=["eng-Latn"],
        main_score=main_score,
        prompt=prompt,
    )


class SmallSts(AbsTaskSTS):
    metadata = metadata("SmallSts", "STS", "cosine_spearman", STS_PROMPT)

    def load_data(self, **_: Any) -> None:
        rows = {"sentence1": FIRST, "sentence2": SECOND, "score": RATINGS}
        self.dataset = DatasetDict(test=Dataset.from_dict(rows))
        self.data_loaded = True


class SmallRetrieval(AbsTaskRetrieval):
    metadata = metadata("SmallRetrieval", "Retrieval", "ndcg_at_10", {"query": RETRIEVAL_PROMPT})

    def load_data(self, **_: Any) -> None:
        queries = Dataset.from_dict({"id": list(QUERIES), "text": list(QUERIES.values())})
        corpus = Dataset.from_dict({"id": [f"d{i}" for i in range(5)], "title": TITLES, "text": BODIES})
        split = {"corpus": corpus, "queries": queries, "relevant_docs": dict(RELEVANT), "top_ranked": None}
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class SmallReranking(SmallRetrieval):
    """The prompt is one text, as in a third of mteb's reranking tasks: mteb would put it before documents too."""

    metadata = metadata("SmallReranking", "Reranking", "map_at_1000", RETRIEVAL_PROMPT)

    def load_data(self, **_: Any) -> None:
        super().load_data()
        self.dataset["default"]["test"]["top_ranked"] = {query: ["d4", "d0", "d3"] for query in QUERIES}


class SmallClassification(AbsTaskClassification):
    metadata = metadata("SmallClassification", "Classification", "accuracy", CLASSIFICATION_PROMPT)
    samples_per_label = 2
    n_experiments = 1

    def load_data(self, **_: Any) -> None:
        train = Dataset.from_dict({"text": FIRST, "label": LABELS})
        self.dataset = DatasetDict(train=train, test=Dataset.from_dict({"text": SECOND, "label": LABELS}))
        self.data_loaded = True


class Call(NamedTuple):
    """What was asked of the embedder."""

    texts: list[str]
    instruction: str
    batch_size: int
    show_progress: bool


@pytest.fixture(autouse=True)
def no_connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    attempts = []

    def refuse(_: socket.socket, address: object) -> None:
        attempts.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert attempts == []


@pytest.fixture(scope="module")
def embedder(small_models: SmallModels) -> Embedder:
    return Embedder(small_models.bundle("qwen2"), threads=2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    recorded: list[Call] = []
    encode = Embedder.encode

    def record(self: Embedder, texts: list[str], **options: Any) -> np.ndarray:
        if texts:
            recorded.append(Call(texts, options["instruction"], options["batch_size"], options["show_progress"]))
        return encode(self, texts, **options)

    monkeypatch.setattr(Embedder, "encode", record)
    return recorded


def run(model: MtebEncoder, task: Any, **options: Any) -> dict[str, Any]:
    options = {"cache": None, "co2_tracker": False, "show_progress_bar": False, **options}
    (result,) = mteb.evaluate(model, task, **options).task_results
    (scores,) = result.scores["test"]
    return scores


def ndcg(similarities: np.ndarray) -> float:
    """Mean over the queries of DCG by ideal DCG, with linear gains."""
    values = []
    for row, relevant in zip(similarities, RELEVANT.values(), strict=True):
        gains = np.array([relevant.get(f"d{document}", 0) for document in np.argsort(-row)])
        discounts = 1 / np.log2(np.arange(len(gains)) + 2)
        values.append((gains @ discounts) / (np.sort(gains)[::-1] @ discounts))
    return float(np.mean(values))


def test_sts_scores_are_those_of_the_vectors(embedder: Embedder) -> None:
    def by_hand(instruction: str) -> tuple[float, float]:
        first, second = (embedder.encode(texts, instruction=instruction) for texts in (FIRST, SECOND))
        cosines = (first * second).sum(axis=1)
        return spearmanr(RATINGS, cosines)[0], pearsonr(RATINGS, cosines)[0]

    scores = run(MtebEncoder(embedder), SmallSts())
    spearman, pearson = by_hand(STS_PROMPT)
    assert abs(scores["main_score"] - spearman) < MTEB_SCORE_MAX_DIFFERENCE
    assert abs(scores["cosine_pearson"] - pearson) < MTEB_SCORE_MAX_DIFFERENCE
    assert abs(scores["pearson"] - pearson) < MTEB_SCORE_MAX_DIFFERENCE  # by our similarity, not mteb's
    assert abs(scores["cosine_pearson"] - by_hand("")[1]) > CONTROL_MIN_DIFFERENCE


@pytest.mark.parametrize("wrong", [("", ""), ("", RETRIEVAL_PROMPT), (RETRIEVAL_PROMPT, RETRIEVAL_PROMPT)])
def test_a_wrong_prompt_would_show_in_retrieval(embedder: Embedder, wrong: tuple[str, str]) -> None:
    def similarities(of_queries: str, of_documents: str) -> np.ndarray:
        queries = embedder.encode(list(QUERIES.values()), instruction=of_queries)
        return queries @ embedder.encode(CORPUS, instruction=of_documents).T

    assert np.abs(similarities(RETRIEVAL_PROMPT, "") - similarities(*wrong)).max() > CONTROL_MIN_DIFFERENCE


def test_retrieval_scores_are_those_of_the_vectors(embedder: Embedder, tmp_path: Path) -> None:
    scores = run(MtebEncoder(embedder), SmallRetrieval(), prediction_folder=tmp_path)
    queries = embedder.encode(list(QUERIES.values()), instruction=RETRIEVAL_PROMPT)
    similarities = queries @ embedder.encode(CORPUS).T
    found = json.loads((tmp_path / "SmallRetrieval_predictions.json").read_text())["default"]["test"]
    theirs = np.array([[found[query][f"d{document}"] for document in range(5)] for query in QUERIES])
    assert np.abs(theirs - similarities).max() < MTEB_SCORE_MAX_DIFFERENCE
    assert abs(scores["main_score"] - ndcg(similarities)) < MTEB_SCORE_MAX_DIFFERENCE


@pytest.mark.parametrize("task", [SmallRetrieval, SmallReranking])
def test_queries_carry_the_instruction_and_documents_none(embedder: Embedder, calls: list[Call], task: Any) -> None:
    run(MtebEncoder(embedder), task())
    assert calls == [Call(list(QUERIES.values()), RETRIEVAL_PROMPT, 32, False), Call(CORPUS, "", 32, False)]


def test_every_text_of_a_classification_carries_the_instruction(embedder: Embedder, calls: list[Call]) -> None:
    run(MtebEncoder(embedder), SmallClassification())
    assert {call.instruction for call in calls} == {CLASSIFICATION_PROMPT}
    assert {text for call in calls for text in call.texts} >= set(SECOND)


def test_encode_kwargs_reach_the_embedder(embedder: Embedder, calls: list[Call]) -> None:
    run(MtebEncoder(embedder), SmallSts(), encode_kwargs={"batch_size": 2, "show_progress_bar": True})
    assert calls == [Call(FIRST, STS_PROMPT, 2, True), Call(SECOND, STS_PROMPT, 2, True)]
    with pytest.raises(ValueError, match=r"encode_kwargs: precision is 'int8'; a bundle gives 'float32'"):
        run(MtebEncoder(embedder), SmallSts(), encode_kwargs={"precision": "int8"})


@pytest.mark.parametrize(
    ("prompts", "query", "document"),
    [
        ({"SmallRetrieval": "name"}, "name", ""),
        ({"Retrieval": "type"}, "type", ""),
        ({"query": "kind"}, "kind", ""),
        ({"SmallRetrieval": ""}, "", ""),
        ({"document": "kind"}, RETRIEVAL_PROMPT, "kind"),
        ({"SmallRetrieval": "name", "SmallRetrieval-document": "both"}, "name", "both"),
        ({"Retrieval-document": "type", "SmallRetrieval-document": "name"}, RETRIEVAL_PROMPT, "name"),
        ({"STS": "another type", "SmallSts": "another name"}, RETRIEVAL_PROMPT, ""),
    ],
)
@pytest.mark.filterwarnings("ignore:Task name Small")
def test_prompts_replace_those_of_the_task(
    embedder: Embedder, calls: list[Call], prompts: dict[str, str], query: str, document: str
) -> None:
    run(MtebEncoder(embedder, prompts=prompts), SmallRetrieval())
    assert [(call.texts, call.instruction) for call in calls] == [(list(QUERIES.values()), query), (CORPUS, document)]


@pytest.mark.filterwarnings("ignore:Task name Small")
def test_the_most_specific_prompt_wins(embedder: Embedder) -> None:
    order = ["SmallRetrieval-query", "SmallRetrieval", "Retrieval-query", "Retrieval", "query"]
    for first in range(len(order)):
        encoder = MtebEncoder(embedder, prompts={key: key for key in reversed(order[first:])})
        assert encoder.get_instruction(SmallRetrieval.metadata, PromptType.query) == order[first]


def test_an_unknown_key_is_named(embedder: Embedder) -> None:
    with pytest.warns(UserWarning, match="Task name SciFactt is not valid"):
        MtebEncoder(embedder, prompts={"SciFactt": "Find", "SciFact": "Find"})


@pytest.mark.parametrize(
    ("task", "prompt_type", "instruction"),
    [
        ("SciFact", "query", "Given a scientific claim, retrieve documents that support or refute the claim"),
        ("SciFact", "document", ""),
        ("AskUbuntuDupQuestions", "query", "Retrieve duplicate questions from AskUbuntu forum"),
        ("AskUbuntuDupQuestions", "document", ""),
        ("Banking77Classification", None, "Given a online banking query, find the corresponding intents"),
        ("SprintDuplicateQuestions", None, "Retrieve duplicate questions from Sprint forum"),
        ("STSBenchmark", None, "Retrieve semantically similar text."),  # the task has none, its kind has
        ("BUCC.v2", None, "Retrieve parallel sentences."),
    ],
)
def test_instructions_of_real_tasks(embedder: Embedder, task: str, prompt_type: str | None, instruction: str) -> None:
    encoder = MtebEncoder(embedder)
    kind = PromptType(prompt_type) if prompt_type else None
    assert encoder.get_instruction(mteb.get_task(task).metadata, kind) == instruction


def test_rows_are_in_order_and_float32(embedder: Embedder) -> None:
    texts = ["one", *CORPUS, "", "two words"]  # the embedder runs the longest first
    loader = DataLoader(Dataset.from_dict({"text": texts}), batch_size=3)
    options = {"task_metadata": SmallSts.metadata, "hf_split": "test", "hf_subset": "default"}
    ours = MtebEncoder(embedder).encode(loader, **options, batch_size=2, show_progress_bar=False)
    alone = np.concatenate([embedder.encode([text], instruction=STS_PROMPT) for text in texts])
    assert ours.shape == (8, 48)
    assert ours.dtype == np.float32
    assert np.abs(ours - alone).max() < BATCH_MAX_DIFFERENCE
    assert np.abs(ours - alone[::-1]).max() > CONTROL_MIN_DIFFERENCE


def test_steps_are_passed_on_and_checked_at_once(embedder: Embedder) -> None:
    loader = DataLoader(Dataset.from_dict({"text": FIRST}), batch_size=8)
    options = {"task_metadata": SmallSts.metadata, "hf_split": "test", "hf_subset": "default"}
    for steps in (0, 2):
        ours = MtebEncoder(embedder, steps=steps).encode(loader, **options, show_progress_bar=False)
        np.testing.assert_array_equal(ours, embedder.encode(FIRST, instruction=STS_PROMPT, steps=steps))
    with pytest.raises(ValueError, match="steps"):
        MtebEncoder(embedder, steps=6)


def test_it_is_an_encoder_with_the_facts_of_the_manifest(small_models: SmallModels) -> None:
    bundle = small_models.bundle("qwen2")
    encoder = MtebEncoder(bundle)
    assert isinstance(encoder, EncoderProtocol)
    meta = encoder.mteb_model_meta
    assert ModelMeta.model_validate(meta.model_dump()) == meta
    assert (meta.name, meta.embed_dim, meta.max_tokens, meta.framework) == ("local/qwen2", 48, 48, ["ONNX"])
    assert (meta.similarity_fn_name, meta.use_instructions, meta.experiment_kwargs) == ("cosine", True, None)
    assert meta.n_embedding_parameters == 520 * 48
    assert meta.memory_usage_mb * 2**20 == (bundle / "fp32" / "weights.bin").stat().st_size
    another = MtebEncoder(small_models.bundle("qwen2", steps=2)).mteb_model_meta
    assert len(meta.revision) == 64
    assert another.revision != meta.revision


def test_names_from_hugging_face_are_kept(embedder: Embedder) -> None:
    manifest = msgspec.structs.replace(
        embedder.manifest,
        model=ModelSource("Qwen/Qwen2.5-7B", "c0ffee", "0"),
        adapter=AdapterSource("Roytsai27/GIRCSE-QWEN7B", "beef", "0"),
    )
    meta = model_meta_from_manifest(manifest, precision="fp32", steps=None, prompts={})
    assert (meta.name, meta.adapted_from) == ("Roytsai27/GIRCSE-QWEN7B", "Qwen/Qwen2.5-7B")
    local = msgspec.structs.replace(manifest, adapter=AdapterSource("/home/me/my-lora", None, "0"))
    assert model_meta_from_manifest(local, precision="fp32", steps=None, prompts={}).name == "local/my-lora"


def test_cached_results_are_those_of_the_same_run(embedder: Embedder, calls: list[Call], tmp_path: Path) -> None:
    """Without the experiment in the metadata, mteb would give each of these the scores of the first."""
    cache = ResultCache(tmp_path)
    ways: list[dict[str, Any]] = [{}, {"steps": 2}, {"prompts": {"STS": "Find"}}, {"prompts": {"STS": "Seek"}}]
    scores = [run(MtebEncoder(embedder, **way), SmallSts(), cache=cache)["cosine_pearson"] for way in ways]
    assert len(set(scores)) == len(calls) / 2 == 4
    again = run(MtebEncoder(embedder, steps=5), SmallSts(), cache=cache)["cosine_pearson"]  # 5 is K, the default
    assert abs(again - scores[0]) < MTEB_SCORE_MAX_DIFFERENCE
    assert len(calls) == 8


def test_a_bundle_of_several_precisions(small_bundle: Path) -> None:
    manifest = Manifest.from_json((small_bundle / "gircse.json").read_bytes())
    variants = {"fp32": manifest.variants["fp32"], "twin": manifest.variants["fp32"]}
    (small_bundle / "gircse.json").write_bytes(msgspec.structs.replace(manifest, variants=variants).to_json())
    encoder = MtebEncoder(small_bundle, precision="twin", steps=1)
    assert encoder.mteb_model_meta.experiment_kwargs == {"precision": "twin", "steps": 1}
    assert MtebEncoder(small_bundle).model.precision == "fp32"
    assert MtebEncoder(encoder.model).mteb_model_meta.experiment_kwargs == {"precision": "twin"}


def test_an_open_embedder_takes_no_precision(embedder: Embedder) -> None:
    with pytest.raises(ValueError, match="precision is 'fp32'; an open embedder has a precision already"):
        MtebEncoder(embedder, precision="fp32")


def test_missing_mteb_names_the_extra() -> None:
    code = "import sys; sys.modules['mteb'] = None; import gircse.evaluation.mteb_encoder"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: mteb cannot be imported: ")
    assert last.endswith("; version 2.10 or later is needed. Install it: pip install 'gircse-deploy[mteb]'")
