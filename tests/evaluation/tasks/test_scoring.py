"""Metrics and tasks against values computed by hand or by another library."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score
from support.task_data import STS, beir, write

from gircse.evaluation.parity.soft_token_stats import soft_token_stats
from gircse.evaluation.tasks.files import TaskOptions, read_tasks
from gircse.evaluation.tasks.prompts import Prompt, read_prompts
from gircse.runtime import GircseError
from gircse.runtime.numerics import l2_normalize


def unit_vectors(n: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    return l2_normalize(np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32))


def test_soft_token_health_by_hand() -> None:
    probabilities = np.array([[0.5, 0.25, 0.25, 0], [1, 0, 0, 0], [0.1, 0.1, 0.1, 0.7]], np.float32)
    stats = soft_token_stats(probabilities, np.array([[3, 4], [0, 1], [0, 0]], np.float32), tokens=3)
    np.testing.assert_allclose(stats.entropy[:2], [1.5 * np.log(2), 0], rtol=1e-6)
    np.testing.assert_allclose(stats.top1_mass, [0.5, 1, 0.7])
    np.testing.assert_allclose(stats.padded_mass, [0, 0, 0.7])
    np.testing.assert_allclose(stats.norm, [5, 1, 0])


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.tsv.gz"])
def test_sts(tmp_path: Path, name: str) -> None:
    (task,) = read_tasks(TaskOptions(sts=write(tmp_path / name, STS), sts_instruction="Alike?"))
    assert (task.name, task.metric, len(task.prompts)) == ("pairs", "Spearman", 24)
    assert task.prompts[0] == Prompt("left 0", "Alike?")
    ours, theirs = unit_vectors(24), unit_vectors(24, seed=1)
    row = {prompt.text: at for at, prompt in enumerate(task.prompts)}
    cosines = [ours[row[f"left {i}"]] @ ours[row[f"right {i}"]] for i in range(12)]
    assert task.score(ours) == pytest.approx(spearmanr(cosines, [i % 6 for i in range(12)]).statistic)
    low, high = task.difference_interval(ours, theirs)
    assert low <= task.score(ours) - task.score(theirs) <= high
    assert high - low > 0.1
    assert task.difference_interval(ours, ours) == (0, 0)


def test_sts_interval_of_scores_that_hardly_differ(tmp_path: Path) -> None:
    rows = "".join(f"{int(i == 3)}\tleft {i}\tright {i}\n" for i in range(6))
    (task,) = read_tasks(TaskOptions(sts=write(tmp_path / "x.tsv", "score\tsentence1\tsentence2\n" + rows)))
    assert np.isfinite(task.difference_interval(unit_vectors(12), unit_vectors(12, seed=1))).all()


@pytest.mark.parametrize("qrels", ["qrels/test.tsv", "qrels.tsv"])
def test_retrieval(tmp_path: Path, qrels: str) -> None:
    (task,) = read_tasks(TaskOptions(retrieval=beir(tmp_path, qrels=qrels), retrieval_instruction="Find"))
    assert [prompt.instruction for prompt in task.prompts] == ["Find"] * 4 + [""] * 15  # q4 has no judgement
    assert task.prompts[4].text == "document 0"
    assert task.prompts[5].text == "T1 document 1"
    for_queries, for_documents = unit_vectors(19), unit_vectors(19, seed=1)
    scores = for_queries[:4] @ for_documents[4:].T
    relevance = np.zeros((4, 15))
    for i in range(4):
        for j in (i, i + 5, i + 9):
            relevance[i, j] = 1 + (i + j) % 2
    # trec_eval takes the relevance itself as the gain, as scikit-learn does
    wanted = ndcg_score(relevance, scores, k=10)
    assert task.score_of_steps(for_queries, for_documents) == pytest.approx(wanted, abs=1e-6)
    assert task.score(for_queries) == task.score_of_steps(for_queries, for_queries)
    low, high = task.difference_interval(for_queries, for_documents)
    assert low <= task.score(for_queries) - task.score(for_documents) <= high


def test_classification(tmp_path: Path) -> None:
    path = write(
        tmp_path / "intents.tsv", "label\tdomain\ttext\n" + "".join(f"{i % 2}\tx\ttext {i}\n" for i in range(10))
    )
    (task,) = read_tasks(TaskOptions(classification=path))
    vectors = unit_vectors(10)
    scores = vectors @ vectors.T - 2 * np.eye(10)
    assert task.score(vectors) == np.mean([scores[i].argmax() % 2 == i % 2 for i in range(10)])
    same = l2_normalize(np.eye(2, dtype=np.float32)[[i % 2 for i in range(10)]])
    assert task.score(same) == 1


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({"sts": "x.tsv"}, "a\tb\n1\t2\n", r"columns \['a', 'b'\] \| a header line with \['score', 'sentence1'"),
        ({"sts": "x.tsv"}, STS + "one field\n", r"line 14: 1 fields \| 3"),
        ({"sts": "x.tsv"}, STS.replace("\t3\t", "\tthree\t"), r"line 5: score 'three' \| a number"),
        ({"sts": "x.tsv"}, STS.replace("\t3\t", "\tnan\t"), r"score 'nan'"),
        ({"sts": "x.tsv"}, "score\tsentence1\tsentence2\n" + "1\ta\tb\n" * 5, r"every score is 1.0"),
        ({"sts": "x.tsv"}, "", r"--sts"),
        ({"classification": "x.tsv"}, "label\ttext\na\tb\na\tc\n", r"1 labels \| at least 2"),
        ({"retrieval": "."}, "", r"no corpus.jsonl"),
    ],
)
def test_unusable_tasks(
    tmp_path: Path, options: dict[str, str], text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.tsv", text)
    with pytest.raises(GircseError, match=message):
        read_tasks(TaskOptions(**{name: Path(path) for name, path in options.items()}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", '{"_id": "d0", "text": 3}\n', r"line 1: a int as field 'text'"),
        ("corpus.jsonl", "{\n", r"line 1: .* \| one JSON object a line"),
        ("corpus.jsonl", "[1]\n", r"a JSON list"),
        ("corpus.jsonl", '{"_id": "d0", "text": "only one"}\n', r"line 3: query 'q0', document 'd5' \| ids of"),
    ],
)
def test_unusable_retrieval(tmp_path: Path, name: str, content: str, message: str) -> None:
    beir(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(GircseError, match=message):
        read_tasks(TaskOptions(retrieval=tmp_path))


def test_texts_of_every_kind(tmp_path: Path) -> None:
    lines = [f"text {i}" for i in range(25)]
    plain = write(tmp_path / "texts.txt", "\n".join([*lines, "", "text 3"]))
    assert read_prompts(plain, instruction="Find") == [Prompt(line, "Find") for line in lines]
    rows = [json.dumps({"text": line, **({"instruction": "Own"} if i else {})}) for i, line in enumerate(lines)]
    packed = write(tmp_path / "texts.jsonl.gz", "\n".join(rows))
    assert read_prompts(packed, instruction="Find") == [
        Prompt(line, "Own" if i else "Find") for i, line in enumerate(lines)
    ]
    assert len(read_prompts(None)) == 64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ntwo\n", r"2 different texts \| at least 20"),
        (b"same\n" * 50, r"1 different texts"),
        (b"fine\n\xff\xfe\n", r"\| UTF-8 \|"),
        (None, r"No such file"),
    ],
)
def test_unusable_texts(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "texts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GircseError, match=message):
        read_prompts(path)
    if content is None:
        with pytest.raises(GircseError, match="Not a gzipped file"):
            read_prompts(write_bytes(tmp_path / "texts.txt.gz", b"no gzip"))


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
