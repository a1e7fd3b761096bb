"""What a backend computes on its way to the embedding, collected text by text, and checked to be finite."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from gircse.evaluation.parity.soft_token_stats import SoftTokenStats, soft_token_stats
from gircse.runtime.errors import MeasurementError
from gircse.runtime.manifest import GraphFacts
from gircse.runtime.numerics import Float32


class StepValues(NamedTuple):
    """Some texts after the prompt (step 0) or after a refinement step, float32.

    Attributes:
        rows: positions of the texts.
        step: k.
        state: (batch, hidden), h_k.
        soft_token: (batch, hidden), s_k as computed; None for the prompt.
        probabilities: (batch, vocab), of s_k; None for the prompt.
    """

    rows: list[int]
    step: int
    state: Float32
    soft_token: Float32 | None = None
    probabilities: Float32 | None = None


@dataclass(frozen=True)
class StepTrace:
    """The refinement of n texts.

    Attributes:
        states: (n, K + 1, hidden) float32, h_0..h_K, not normalized.
        soft_tokens: (n, K, hidden) float32, s_1..s_K.
        stats: of the soft tokens, (n, K) each.
    """

    states: Float32
    soft_tokens: Float32
    stats: SoftTokenStats


def collect_trace(
    backend: str, values: Iterable[StepValues], facts: GraphFacts, *, texts: int, traced: int, tokens: int
) -> StepTrace:
    """Keep what is computed on the way.

    Args:
        backend: who computes, for errors.
        values: every text and step once; the steps of a text in their order, everything else in any.
        facts: K and hidden size.
        texts: number of texts.
        traced: number of texts, the first ones, whose soft tokens are kept; of the others, only the states are.
        tokens: tokens of the tokenizer; vocabulary rows from there on are padding.

    Returns:
        States of ``texts`` texts, soft tokens and statistics of ``traced``.

    Raises:
        MeasurementError: a value is NaN or infinite; names the step.
    """
    states = np.empty((texts, facts.steps + 1, facts.hidden_size), np.float32)
    soft_tokens = np.empty((traced, facts.steps, facts.hidden_size), np.float32)
    stats = SoftTokenStats(*(np.empty((traced, facts.steps), np.float32) for _ in fields(SoftTokenStats)))
    for rows, step, state, soft_token, probabilities in values:
        states[rows, step] = state
        kept = [at for at, row in enumerate(rows) if row < traced]
        if not kept or soft_token is None or probabilities is None:
            continue
        kept_rows = [rows[at] for at in kept]
        soft_tokens[kept_rows, step - 1] = soft_token[kept]
        of_step = soft_token_stats(probabilities[kept], soft_token[kept], tokens=tokens)
        for field in fields(SoftTokenStats):
            getattr(stats, field.name)[kept_rows, step - 1] = getattr(of_step, field.name)
    # In the order of the computation: the first value that is not finite is where it went wrong.
    check_finite(backend, "state h", states[:, :1], first_step=0)
    for step in range(1, facts.steps + 1):
        one = slice(step - 1, step)
        check_finite(backend, "entropy of soft token s", stats.entropy[:, one, None], first_step=step)
        check_finite(backend, "soft token s", soft_tokens[:, one], first_step=step)
        check_finite(backend, "state h", states[:, step : step + 1], first_step=step)
    return StepTrace(states, soft_tokens, stats)


def check_finite(backend: str, what: str, values: Float32, *, first_step: int) -> None:
    """Refuse NaN and infinity.

    Args:
        backend: who computed the values.
        what: their name.
        values: (n, steps, size) float32.
        first_step: step of ``values[:, 0]``.

    Raises:
        MeasurementError: a value is not finite; names the first step where that is so.
    """
    bad = np.logical_not(np.isfinite(values).all(axis=-1, keepdims=True))[..., 0]
    if bad.any():
        index = int(bad.any(axis=0).argmax())
        rows = np.flatnonzero(bad[:, index])
        raise MeasurementError(
            f"{backend}, step {first_step + index}: {what}_{first_step + index}",
            f"has NaN or infinity in {len(rows)} of {len(bad)} texts, first in text {rows[0]}",
            None,
            "The precision overflows here, or the weights hold such values: try a wider precision.",
        )
