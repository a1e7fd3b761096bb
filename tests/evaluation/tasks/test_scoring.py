"""Metrics and tasks against values computed by hand or by another library."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score
from support.task_data import STS, beir, write

from gircse.evaluation.tasks.files import TaskOptions, read_tasks
from gircse.evaluation.tasks.prompts import Prompt
from gircse.runtime.numerics import l2_normalize


def unit_vectors(n: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    return l2_normalize(np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32))


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
    assert [prompt.instruction for prompt in task.prompts] == ["Find"] * 4 + [""] * 15  # q4 has no judgment
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
