"""Keys and values of what many prompts begin with, an instruction above all: computed once, kept between calls.

A decoder's keys and values of a token depend on the tokens before it alone, so those of a common beginning serve every
prompt. What is compared are token ids, not strings, because tokens merge across the end of an instruction.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from gircse.runtime.batch_planner import PASS_TOKENS_GPU
from gircse.runtime.numerics import Int64
from gircse.runtime.session import StepOutputs
from gircse.runtime.tokenization import common_length

MAX_BYTES = 256 << 20
"""Of keys and values that are kept; an instruction of 18 tokens has 1 MB in the demo and 2 MB in a 7B."""

WORTH_TOKENS = 24
"""Tokens that a call has to save for a beginning to be computed on its own, which is a pass over all weights."""

WORTH_INSTRUCTION = 8
"""Tokens of an instruction that is always computed on its own: the next call, too, will begin with it."""

WORTH_TOKENS_GPU = PASS_TOKENS_GPU
"""Tokens that a batch has to save on a GPU: so many are multiplied while the weights are read once, so fewer would save
nothing."""

KeysAndValues = tuple[Any, ...]
"""In the order of the graph's inputs; what the session makes, with a ``shape`` (1, tokens, ...) and ``nbytes``."""


class PrefixCacheInfo(NamedTuple):
    """What a cache did and holds.

    Attributes:
        hits: calls that found the keys and values of their beginning.
        misses: calls that computed them.
        prefixes: how many beginnings it holds.
        size: their bytes.
        max_size: most bytes that it keeps.
    """

    hits: int
    misses: int
    prefixes: int
    size: int
    max_size: int


@runtime_checkable
class PrefixSession(Protocol):
    """A session that can go on after keys and values that were computed before.

    Attributes:
        takes_prefixes: whether it can where it runs.
        on_gpu: whether it runs on a GPU.
    """

    takes_prefixes: bool
    on_gpu: bool

    def compute_prefix(self, token_ids: Sequence[int]) -> KeysAndValues:
        """Return the keys and values of the beginning of a prompt."""

    def run_after(self, prefix: KeysAndValues, input_ids: Int64, attention_mask: Int64, *, steps: int) -> StepOutputs:
        """Do what ``Session.run`` does, with prompts that begin with a prefix; padding lies between."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """A beginning of prompts.

    Attributes:
        tokens: how many tokens it has.
        run: embeds one batch of what comes after it, called as ``Session.run`` is.
    """

    tokens: int
    run: Callable[..., StepOutputs]


class PrefixCache:
    """Beginnings by their token ids, the least recently used given up first. Safe to call from several threads."""

    def __init__(self, session: PrefixSession, *, max_bytes: int = MAX_BYTES) -> None:
        """Start empty.

        Args:
            session: computes the keys and values, and embeds what comes after.
            max_bytes: of keys and values that are kept; a beginning that alone is larger is used once.
        """
        self._session, self._max_bytes = session, max_bytes
        self._kept: OrderedDict[tuple[int, ...], KeysAndValues] = OrderedDict()
        self._size = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def info(self) -> PrefixCacheInfo:
        """Return what it did and holds."""
        with self._lock:
            return PrefixCacheInfo(self._hits, self._misses, len(self._kept), self._size, self._max_bytes)

    def choose(self, token_ids: Sequence[list[int]], *, fixed: int, batch_size: int) -> Prefix | None:
        """Return the beginning that a call's prompts should share; None where it would save too little.

        That depends on the call alone, not on what is kept: the same call gives the same bits. For the same reason the
        first tokens of a longer beginning are computed again, which need not give the same bits as with the rest.

        Args:
            token_ids: of every prompt, at least one.
            fixed: tokens of the instruction, which further calls will begin with too; 0 if there is none.
            batch_size: maximum texts per batch.
        """
        tokens = min(common_length(token_ids), min(map(len, token_ids)) - 1)  # a prompt needs a token of its own
        if fixed:
            tokens = min(tokens, fixed)  # what else these prompts share is of no use to the next call
        if self._session.on_gpu:
            worth = min(len(token_ids), batch_size) * tokens >= WORTH_TOKENS_GPU
        else:
            worth = (len(token_ids) - 1) * tokens >= WORTH_TOKENS or WORTH_INSTRUCTION <= tokens <= fixed
        if not worth:
            return None
        beginning = tuple(token_ids[0][:tokens])
        with self._lock:
            found = self._kept.get(beginning)
            if found is not None:
                self._hits += 1
                self._kept.move_to_end(beginning)
        if found is None:
            found = self._session.compute_prefix(beginning)
            self._keep(beginning, found)
        return Prefix(tokens, functools.partial(self._session.run_after, found))

    def _keep(self, beginning: tuple[int, ...], found: KeysAndValues) -> None:
        with self._lock:
            self._misses += 1
            if beginning in self._kept:  # of another thread
                return
            self._kept[beginning] = found
            self._size += _size_of(found)
            while self._size > self._max_bytes:
                _, dropped = self._kept.popitem(last=False)
                self._size -= _size_of(dropped)


def _size_of(found: KeysAndValues) -> int:
    return sum(value.nbytes for value in found)
