"""Which prompts are embedded together, and their padding."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gircse.runtime.numerics import Int64

DEFAULT_BATCH_SIZE = 32
DEFAULT_BATCH_TOKENS = 4096

PASS_TOKENS = 18
"""Tokens that a CPU computes while it reads all weights once more, which each pass of a batch does. Of the demo in INT8
on two cores: 76 ms for the nine passes of a batch, 0.48 ms a token."""

PASS_TOKENS_GPU = 256
"""The same on a GPU in FP16: 150 on an A100, 200 on an H200, 300 on an H100, 400 on an L4, by their data sheets."""

STREAM_ROWS = 8
"""Fewest prompts that a batch is divided into for the sake of further streams."""


@dataclass(frozen=True)
class TokenBatch:
    """Prompts that are embedded together.

    Attributes:
        rows: positions of the prompts in the caller's order.
        input_ids: (batch, tokens) int64, padded on the left.
        attention_mask: (batch, tokens) int64, 1 for a real token.
    """

    rows: tuple[int, ...]
    input_ids: Int64
    attention_mask: Int64


def plan_batches(
    lengths: Sequence[int], *, batch_size: int, batch_tokens: int, batch_cost: int
) -> list[tuple[int, ...]]:
    """Group prompts of similar length so that padding and batches together cost least.

    Sorted by length, longest first, a batch is a range of prompts, so the least cost of the first n prompts follows
    from that of fewer. A prompt that alone exceeds the budget of tokens is a batch of its own.

    Args:
        lengths: tokens of each prompt, at least one.
        batch_size: maximum prompts per batch.
        batch_tokens: maximum tokens per batch, padding included.
        batch_cost: tokens of padding that take as long as one more batch.

    Returns:
        Positions of the prompts of each batch.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    least = np.full(len(order) + 1, np.inf)  # cost of the first n prompts
    least[0] = 0
    begins = np.zeros(len(order) + 1, np.int64)  # where the last batch of the first n prompts begins
    for begin, row in enumerate(order):
        most = min(batch_size, max(1, batch_tokens // lengths[row]), len(order) - begin)
        costs = least[begin] + batch_cost + lengths[row] * np.arange(1, most + 1)
        ends = slice(begin + 1, begin + most + 1)
        better = costs < least[ends]
        least[ends][better] = costs[better]
        begins[ends][better] = begin
    batches = []
    end = len(order)
    while end:
        begin = int(begins[end])
        batches.append(tuple(order[begin:end]))
        end = begin
    return batches[::-1]


def stream_batch_size(prompts: int, *, batch_size: int, streams: int) -> int:
    """Return the maximum prompts of a batch with which every stream has its share.

    A batch is not divided below ``STREAM_ROWS``: each part reads all weights.

    Args:
        prompts: how many there are.
        batch_size: maximum prompts of a batch.
        streams: batches that run at once.
    """
    if streams == 1:
        return batch_size
    of_a_stream = math.ceil(prompts / streams)
    batches = max(1, math.ceil(of_a_stream / batch_size))
    return min(batch_size, max(STREAM_ROWS, math.ceil(of_a_stream / batches)))


def pad_batch(rows: tuple[int, ...], token_ids: Sequence[list[int]], *, pad_token_id: int) -> TokenBatch:
    """Pad the prompts at ``rows`` on the left to the longest of them."""
    longest = max(len(token_ids[row]) for row in rows)
    input_ids = np.full((len(rows), longest), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for i, row in enumerate(rows):
        ids = token_ids[row]
        input_ids[i, longest - len(ids) :] = ids
        attention_mask[i, longest - len(ids) :] = 1
    return TokenBatch(rows, input_ids, attention_mask)


def padded_batches(
    token_ids: Sequence[list[int]],
    *,
    pad_token_id: int,
    batch_size: int,
    batch_tokens: int,
) -> Iterator[TokenBatch]:
    """Group token ids by length and pad each group, for models that run outside the runtime.

    The arguments are those of ``plan_batches`` and ``pad_batch``; a batch costs what it does on a CPU with eight steps.
    """
    cost = 9 * PASS_TOKENS
    lengths = [len(ids) for ids in token_ids]
    for rows in plan_batches(lengths, batch_size=batch_size, batch_tokens=batch_tokens, batch_cost=cost):
        yield pad_batch(rows, token_ids, pad_token_id=pad_token_id)
