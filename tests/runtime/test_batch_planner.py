"""Which prompts run together, and their padding."""

import itertools

import numpy as np
import pytest

from gircse.runtime.batch_planner import STREAM_ROWS, pad_batch, plan_batches, stream_batch_size


@pytest.mark.parametrize("cost", [0, 5, 1000])
@pytest.mark.parametrize("tokens", [1, 10, 24, 1000])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_batches_hold_every_row_once_within_the_limits(size: int, tokens: int, cost: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 20, 57).tolist()
    batches = plan_batches(lengths, batch_size=size, batch_tokens=tokens, batch_cost=cost)
    assert sorted(itertools.chain(*batches)) == list(range(57))
    for batch in batches:
        assert len(batch) <= size
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= tokens


def test_like_lengths_are_together_the_longest_first_and_equal_ones_in_order() -> None:
    assert plan_batches([1, 9, 2, 8], batch_size=2, batch_tokens=100, batch_cost=9) == [(1, 3), (2, 0)]
    assert plan_batches([1, 1, 1], batch_size=32, batch_tokens=100, batch_cost=9) == [(0, 1, 2)]
    assert plan_batches([], batch_size=32, batch_tokens=100, batch_cost=9) == []


def test_a_batch_is_divided_where_its_padding_costs_more_than_another_batch() -> None:
    lengths = [10, 4, 4, 4]  # 18 tokens of padding in one batch
    assert plan_batches(lengths, batch_size=32, batch_tokens=100, batch_cost=17) == [(0,), (1, 2, 3)]
    assert plan_batches(lengths, batch_size=32, batch_tokens=100, batch_cost=19) == [(0, 1, 2, 3)]


@pytest.mark.parametrize("cost", [1, 7, 30])
def test_no_other_plan_costs_less(cost: int) -> None:
    lengths = sorted(np.random.default_rng(cost).integers(1, 30, 10).tolist(), reverse=True)

    def cost_of(batches: list[tuple[int, ...]]) -> int:
        return sum(cost + len(batch) * lengths[batch[0]] for batch in batches)

    def plans() -> list[list[tuple[int, ...]]]:
        cuts = itertools.chain.from_iterable(itertools.combinations(range(1, 10), count) for count in range(10))
        return [[tuple(range(begin, end)) for begin, end in itertools.pairwise((0, *chosen, 10))] for chosen in cuts]

    allowed = [
        plan for plan in plans() if all(len(batch) <= 4 and len(batch) * lengths[batch[0]] <= 60 for batch in plan)
    ]
    found = plan_batches(lengths, batch_size=4, batch_tokens=60, batch_cost=cost)
    assert found in allowed
    assert cost_of(found) == min(map(cost_of, allowed))


@pytest.mark.parametrize(
    ("prompts", "streams", "expected"),
    [
        (500, 1, 32),
        (1, 2, STREAM_ROWS),
        (20, 2, 10),
        (64, 2, 32),
        (65, 2, 17),  # four batches, not three
        (64, 16, STREAM_ROWS),
        (0, 4, STREAM_ROWS),
    ],
)
def test_every_stream_has_its_share(prompts: int, streams: int, expected: int) -> None:
    assert stream_batch_size(prompts, batch_size=32, streams=streams) == expected
    assert stream_batch_size(prompts, batch_size=3, streams=streams) == 3


def test_padding_is_on_the_left() -> None:
    batch = pad_batch((2, 0), [[5], [9], [6, 7, 8]], pad_token_id=1)
    np.testing.assert_array_equal(batch.input_ids, [[6, 7, 8], [1, 1, 5]])
    np.testing.assert_array_equal(batch.attention_mask, [[1, 1, 1], [0, 0, 1]])
    assert batch.input_ids.dtype == batch.attention_mask.dtype == np.int64
