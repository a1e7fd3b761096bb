"""From vectors to the numbers of a report, by hand."""

from dataclasses import replace

import numpy as np
import pytest

from gircse.evaluation.parity.compare import (
    ReferenceRun,
    compare_batches,
    compare_cross_steps,
    compare_steps,
    compare_texts,
    evaluate_gates,
)
from gircse.evaluation.parity.report_schema import BatchVariance, StepParity
from gircse.evaluation.parity.soft_token_stats import SoftTokenStats
from gircse.evaluation.parity.step_trace import StepTrace
from gircse.runtime import MeasurementError
from gircse.runtime.manifest import Pooling
from gircse.runtime.numerics import Float32, l2_normalize, pool_states
from gircse.runtime.precision import SPECS, Precision

TEXTS, STEPS, HIDDEN = 24, 2, 16


def trace_of(states: Float32) -> StepTrace:
    nothing = np.zeros((TEXTS, STEPS), np.float32)
    return StepTrace(states, states[:, 1:], SoftTokenStats(nothing, nothing, nothing, nothing))


@pytest.fixture
def reference() -> ReferenceRun:
    states = np.random.default_rng(0).standard_normal((TEXTS, STEPS + 1, HIDDEN)).astype(np.float32)
    vectors = l2_normalize(pool_states(states, Pooling.MEAN))
    return ReferenceRun("reference", vectors, trace_of(states), [], None)


def steps_of(reference: ReferenceRun, states: Float32, forced: Float32) -> list[StepParity]:
    vectors = l2_normalize(pool_states(states, Pooling.MEAN))
    texts = compare_texts(vectors, trace_of(states), reference, Pooling.MEAN)
    return compare_steps(vectors, trace_of(states), forced, reference, texts)


def test_one_damaged_text_shows_in_the_extremes(reference: ReferenceRun) -> None:
    states = reference.trace.states.copy()
    states[3, 2] *= 3
    first, second, last = steps_of(reference, states, reference.trace.states)
    for step in (first, second):
        assert (step.max_difference, step.rank_correlation, step.neighbor_overlap) == (0, pytest.approx(1), 1)
    h = reference.trace.states[3].astype(np.float64)
    ours, theirs = h[1] + 3 * h[2], h[1] + h[2]
    lengths = np.linalg.norm(ours), np.linalg.norm(theirs)
    assert last.cosine_min == pytest.approx(ours @ theirs / np.prod(lengths), abs=1e-6)
    assert last.cosine_mean == pytest.approx(1 - (1 - last.cosine_min) / TEXTS, abs=1e-6)
    ratios = sorted((1, lengths[0] / lengths[1]))
    assert [last.norm_ratio_min, last.norm_ratio_max] == pytest.approx(ratios, rel=1e-5)
    assert last.max_difference == pytest.approx(np.abs(ours / lengths[0] - theirs / lengths[1]).max(), abs=1e-6)
    assert last.state_cosine_min == pytest.approx(1)  # a longer state has the same direction
    assert last.rank_correlation < 1
    assert first.soft_tokens is None
    assert last.soft_tokens is not None


def test_forced_states_are_kept_apart_from_free_ones(reference: ReferenceRun) -> None:
    forced = reference.trace.states.copy()
    forced[5, 1] *= -1
    steps = steps_of(reference, reference.trace.states, forced)
    assert [round(step.forced_state_cosine_min, 5) for step in steps] == [1, -1, 1]
    assert [round(step.state_cosine_min, 5) for step in steps] == [1, 1, 1]


def test_texts_that_do_not_differ_say_nothing(reference: ReferenceRun) -> None:
    same = np.tile(reference.trace.states[:1], (TEXTS, 1, 1))
    with pytest.raises(MeasurementError, match="step 0 gives all texts the same similarity to each other"):
        steps_of(reference, same, same)


def test_batch_variance(reference: ReferenceRun) -> None:
    alone = reference.vectors.copy()
    alone[7, 1, 4] += 0.25
    variance = compare_batches(alone, reference.vectors)
    assert variance.texts == TEXTS
    assert variance.max_difference == pytest.approx(0.25)
    assert 0.9 < variance.cosine_min < 0.999


def test_steps_against_steps_without_a_retrieval_task(reference: ReferenceRun) -> None:
    cross = compare_cross_steps([], [], reference.vectors, reference)
    matrix = np.array(cross.matrix)
    assert (cross.task, matrix.shape) == (None, (STEPS, STEPS))
    assert matrix[-1, -1] == pytest.approx(1)
    assert matrix[0, 0] < 0.9


def test_every_number_has_a_gate(reference: ReferenceRun) -> None:
    states = reference.trace.states
    steps = steps_of(reference, states, states)
    variance = compare_batches(reference.vectors, reference.vectors)
    limits = SPECS[Precision.FP32].limits
    gates = {gate.name: gate for gate in evaluate_gates(limits, steps, variance, [], 1)}
    failed = {name for name, gate in gates.items() if not gate.passed}
    assert (len(gates), failed) == (5, {"texts with other token ids"})
    off = BatchVariance(texts=1, max_difference=2 * limits.max_batch_difference, cosine_min=1.0)
    gates = {gate.name: gate for gate in evaluate_gates(limits, steps, variance, [], None, off)}
    assert {name for name, gate in gates.items() if not gate.passed} == {"prefix difference"}
    gates = evaluate_gates(replace(limits, min_overlap=1.5), steps, variance, [], None)
    assert {gate.name for gate in gates if not gate.passed} == {"neighbor overlap"}


def test_the_prompt_counts_only_without_refinement(reference: ReferenceRun) -> None:
    states = reference.trace.states.copy()
    states[0, 0] *= -1
    steps = steps_of(reference, states, states)
    variance = compare_batches(reference.vectors, reference.vectors)
    limits = SPECS[Precision.FP32].limits
    assert evaluate_gates(limits, steps, variance, [], None)[0].passed
    assert not evaluate_gates(limits, steps[:1], variance, [], None)[0].passed
