"""A parity run measures right, passes what is equal and fails what is not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.schema_documents import documented, schema_of
from support.small_models import SmallModels, add_stepwise_variants, edit_manifest, rehash, scale_weights
from support.task_data import STS, beir, write
from support.tolerances import BATCH_MAX_DIFFERENCE, SMALL_MODEL_MAX_DIFFERENCE

from gircse.evaluation.parity.backends import BundleBackend
from gircse.evaluation.parity.compare import compare_batches
from gircse.evaluation.parity.gates import at_most, limits_of
from gircse.evaluation.parity.options import ParityOptions
from gircse.evaluation.parity.report_schema import ParityReport
from gircse.evaluation.parity.run import measure_parity
from gircse.evaluation.parity.sides import run_with_and_without_cache
from gircse.evaluation.tasks.files import TaskOptions, read_tasks
from gircse.reporting.progress import StageProgress
from gircse.runtime import BundleError, Embedder
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.ort_session import StepwiseSession
from gircse.runtime.tokenization import open_tokenizer


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("against", ["torch", "other bundle"])
def test_equal_backends_pass(small_models: SmallModels, layout: Layout, against: str) -> None:
    other = small_models.bundle("llama", layout="stepwise")
    options = ParityOptions(
        small_models.bundle("llama"),
        layout=layout,
        reference="torch" if against == "torch" else f"{other}:fp32",
        cross_steps=True,
    )
    result = measure_parity(options)
    (candidate,) = result.report.candidates
    assert result.report.passed
    assert [step.step for step in candidate.steps] == [0, 1, 2, 3, 4, 5]
    assert len(candidate.texts) == result.report.texts == 64
    assert candidate.batch_variance.texts == 32
    for step in candidate.steps:
        assert step.max_difference < SMALL_MODEL_MAX_DIFFERENCE
        assert abs(step.norm_ratio_min - 1) < 1e-4 > abs(step.norm_ratio_max - 1)
        assert min(step.cosine_min, step.state_cosine_min, step.forced_state_cosine_min) > 0.999999
    matrix = np.array(candidate.cross_steps.matrix)
    assert matrix.shape == (5, 5)
    assert matrix[-1, -1] == pytest.approx(candidate.steps[-1].rank_correlation, abs=1e-6)
    assert matrix[0, 0] < 0.999  # fewer steps are something else
    names = [gate.name for gate in candidate.gates]
    assert ("texts with other token ids" in names) == (against == "torch")
    assert ("prefix difference" in names) == (layout is Layout.STEPWISE)
    if candidate.prefix_variance:
        assert candidate.prefix_variance.texts == 20
        assert candidate.prefix_variance.max_difference < BATCH_MAX_DIFFERENCE


def test_a_prefix_cache_that_gives_other_vectors_fails(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange_keys_and_values(session: StepwiseSession, token_ids: list[int]) -> tuple[np.ndarray, ...]:
        return tuple(reversed(compute_prefix(session, token_ids)))

    compute_prefix = StepwiseSession.compute_prefix
    backend = BundleBackend(Bundle.open(bundle), "fp32", layout=Layout.STEPWISE)
    prompts = open_tokenizer(Bundle.open(bundle))(["one text", "another"], instruction="Find bundles")
    gates = []
    for computes in (compute_prefix, exchange_keys_and_values):
        monkeypatch.setattr(StepwiseSession, "compute_prefix", computes)
        found = run_with_and_without_cache(StageProgress(), backend, backend.open_embedder(), prompts)
        assert found is not None
        difference = compare_batches(*found).max_difference
        gates.append(at_most("prefix difference", difference, limits_of("fp32", {}).max_batch_difference).passed)
    assert gates == [True, False]


def test_damage_is_measured_and_told_apart(small_models: SmallModels, bundle_copy: Path) -> None:
    """Weights that are a little off: every gate fails, and forcing the soft tokens takes the drift away."""
    scale_weights(bundle_copy, 0.0, 1.0, 1.05)
    result = measure_parity(ParityOptions(bundle_copy))
    (candidate,) = result.report.candidates
    failed = {gate.name for gate in candidate.gates if not gate.passed}
    assert failed == {"cosine", "rank correlation", "neighbor overlap"}
    last = candidate.steps[-1]
    assert last.cosine_min < 0.999
    assert last.norm_ratio_max > 1.02
    assert 1 - last.forced_state_cosine_min < 0.7 * (1 - last.state_cosine_min)
    embedded = Embedder(bundle_copy).encode([prompt.text for prompt in result.prompts], all_steps=True)
    wanted = Embedder(small_models.bundle("llama")).encode([prompt.text for prompt in result.prompts], all_steps=True)
    by_hand = (embedded * wanted).sum(-1)
    for step in candidate.steps[1:]:
        assert step.cosine_min == pytest.approx(by_hand[:, step.step - 1].min(), abs=1e-5)
        assert candidate.texts[5].cosine[step.step] == pytest.approx(by_hand[5, step.step - 1], abs=1e-5)


def test_task_scores_are_those_of_the_vectors(bundle: Path, bundle_copy: Path, tmp_path: Path) -> None:
    scale_weights(bundle_copy, 0.0, 1.0, 1.05)
    tasks = TaskOptions(sts=write(tmp_path / "pairs.tsv", STS), retrieval=beir(tmp_path / "found"))
    reference = f"{bundle}:fp32"
    options = ParityOptions(
        bundle_copy, reference=reference, tasks=tasks, cross_steps=True, limits={"max_task_drop": -1.0}
    )
    (candidate,) = measure_parity(options).report.candidates
    sts, retrieval = candidate.tasks
    assert (sts.metric, retrieval.metric) == ("Spearman", "nDCG@10")
    gates = {gate.name: gate for gate in candidate.gates}
    for task in (sts, retrieval):
        gate = gates[f"drop of {task.metric}, {task.task}"]
        assert gate.value == task.reference[-1] - task.candidate[-1]
        assert not gate.passed
        assert task.difference_low <= task.candidate[-1] - task.reference[-1] <= task.difference_high
    assert candidate.cross_steps.metric == "nDCG@10"
    assert candidate.cross_steps.matrix[4][4] == retrieval.candidate[5]
    # by hand, from the runtime
    for task, found in zip(read_tasks(tasks), candidate.tasks, strict=True):
        for path, scores in ((bundle_copy, found.candidate), (bundle, found.reference)):
            embedder = Embedder(path)
            vectors = np.concatenate(
                [embedder.encode([prompt.text], instruction=prompt.instruction, steps=2) for prompt in task.prompts]
            )
            assert scores[2] == pytest.approx(task.score(vectors), abs=1e-3)


def test_tokenizer_that_differs_from_the_checkpoint_fails(bundle_copy: Path) -> None:
    path = bundle_copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    rehash(bundle_copy)
    # Without golden texts: they would show it when the bundle is opened.
    edit_manifest(bundle_copy, lambda manifest: manifest.update(golden=False, golden_missing_reason="left out"))
    (candidate,) = measure_parity(ParityOptions(bundle_copy)).report.candidates
    gate = candidate.gates[-1]
    assert gate.name == "texts with other token ids"
    assert gate.value > 30
    assert not gate.passed


def test_bundle_without_refinement(small_models: SmallModels) -> None:
    (candidate,) = measure_parity(
        ParityOptions(small_models.bundle("llama", steps=0), cross_steps=True)
    ).report.candidates
    assert candidate.passed
    assert [step.step for step in candidate.steps] == [0]


def test_a_variant_without_the_unrolled_graph_is_compared_in_the_stepwise_one(bundle_copy: Path) -> None:
    add_stepwise_variants(bundle_copy, "int8")
    candidates = measure_parity(ParityOptions(bundle_copy, reference=f"{bundle_copy}:fp32")).report.candidates
    assert [(candidate.precision, candidate.passed) for candidate in candidates] == [("int8", True)]
    unrolled = ParityOptions(bundle_copy, reference=f"{bundle_copy}:int8", layout=Layout.UNROLLED)
    assert [candidate.precision for candidate in measure_parity(unrolled).report.candidates] == ["fp32"]
    with pytest.raises(BundleError, match=r"int8.*unrolled.*stepwise"):
        measure_parity(replace(unrolled, precisions=("int8",)))


def test_progress_is_silent_on_request(small_models: SmallModels, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever calls from Python may bring a progress display of their own."""
    options = ParityOptions(small_models.bundle("llama", steps=0), reference="torch")
    measure_parity(options, progress=StageProgress())
    assert "compare fp32" in capsys.readouterr().err


def test_schema_document_is_up_to_date() -> None:
    assert documented("parity.schema.json") == schema_of(ParityReport)
