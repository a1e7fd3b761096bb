"""What prompts begin with is run once, kept as long as there is room, and changes no vector beyond its last bits."""

import gc
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_models import SmallModels
from support.tolerances import BATCH_MAX_DIFFERENCE

from gircse.runtime import Embedder
from gircse.runtime.batch_runner import BatchRunner
from gircse.runtime.bundle import Bundle
from gircse.runtime.prefix_cache import PrefixCache, PrefixCacheInfo
from gircse.runtime.tokenization import common_length

INSTRUCTION = "Given a question, retrieve passages that answer it and are about bundles"
TEXTS = ["how is a bundle written?", "ok", "", "ünïcödé 😀", "a text may be long or short " * 3, "input_ids has shape"]


class CountingSession:
    """Makes keys and values of 4 bytes a token."""

    takes_prefixes, on_gpu = True, False

    def __init__(self) -> None:
        self.computed: list[tuple[int, ...]] = []

    def compute_prefix(self, token_ids: Sequence[int]) -> tuple[Any, ...]:
        self.computed.append(tuple(token_ids))
        return (np.float32([token_ids])[:, :, None],)

    def run_after(self, prefix: tuple[Any, ...], *_: Any, steps: int) -> Any:
        return prefix[0][0, :, 0].tolist(), steps


def test_many_prompts_share_what_they_begin_with() -> None:
    cache = PrefixCache(session := CountingSession())
    beginning = list(range(20))
    prefix = cache.choose([[*beginning, 30], [*beginning, 31, 32], [*beginning, 30, 5]], fixed=0, batch_size=32)
    assert prefix is not None
    assert (prefix.tokens, prefix.run(None, None, steps=3)) == (20, (beginning, 3))
    assert session.computed == [tuple(beginning)]
    assert cache.info() == PrefixCacheInfo(0, 1, 1, 80, 256 << 20)


@pytest.mark.parametrize(
    ("prompts", "fixed"),
    [
        ([[1, 2, 3]], 0),  # nobody knows where its instruction ends
        ([[1, 2], [2, 3]], 0),
        ([[1, 2], [2, 3]], 2),
        ([[7], [7]], 1),  # each prompt needs a token of its own
        ([[*range(23), 98], [*range(23), 99]], 0),  # saves 23 tokens and costs a pass
        ([[*range(7), 99]], 7),
    ],
)
def test_what_saves_too_little_is_run_whole(prompts: list[list[int]], fixed: int) -> None:
    assert PrefixCache(CountingSession()).choose(prompts, fixed=fixed, batch_size=32) is None


@pytest.mark.parametrize(("tokens", "texts", "fixed"), [(24, 2, 0), (8, 4, 0), (8, 1, 8)])
def test_the_least_that_is_worth_it(tokens: int, texts: int, fixed: int) -> None:
    prompts = [[*range(tokens), 90 + text] for text in range(texts)]
    prefix = PrefixCache(CountingSession()).choose(prompts, fixed=fixed, batch_size=1)
    assert prefix is not None
    assert prefix.tokens == tokens


@pytest.mark.parametrize(
    ("texts", "tokens", "fixed", "batch_size", "shared"),
    [
        (32, 8, 8, 32, True),
        (31, 8, 8, 32, False),  # a batch saves 248 tokens, which are multiplied while the weights are read
        (1000, 8, 8, 16, False),
        (1000, 16, 0, 16, True),
        (1, 64, 64, 32, False),  # on a CPU, an instruction of 64 tokens is worth it for one text
    ],
)
def test_a_gpu_has_to_save_more(texts: int, tokens: int, fixed: int, batch_size: int, shared: bool) -> None:
    session = CountingSession()
    session.on_gpu = True
    prompts = [[*range(tokens), 900 + text] for text in range(texts)]
    assert (PrefixCache(session).choose(prompts, fixed=fixed, batch_size=batch_size) is not None) == shared


@pytest.mark.parametrize(
    ("takes", "on_gpu", "wanted", "has_one"),
    [
        (True, False, None, True),
        (True, True, None, False),
        (True, True, True, True),
        (False, True, True, False),
        (True, False, False, False),
    ],
)
def test_where_there_is_a_cache(bundle: Path, takes: bool, on_gpu: bool, wanted: bool | None, has_one: bool) -> None:
    session: Any = CountingSession()
    session.takes_prefixes, session.on_gpu = takes, on_gpu
    runner = BatchRunner(Bundle.open(bundle).manifest, None, session, prefix_cache=wanted)
    assert bool(runner.prefix_cache_info().max_size) == has_one


def test_an_instruction_is_computed_with_the_first_prompt_and_kept_for_the_next() -> None:
    cache = PrefixCache(session := CountingSession())
    found = [cache.choose([[*range(8), text]], fixed=8, batch_size=32) for text in (97, 98, 99)]
    assert [prefix and prefix.tokens for prefix in found] == [8, 8, 8]
    assert session.computed == [tuple(range(8))]
    assert cache.info()[:2] == (2, 1)


def test_a_prompt_keeps_a_token_of_its_own() -> None:
    cache = PrefixCache(session := CountingSession())
    prefix = cache.choose(
        [list(range(40)), [*range(40), 50]], fixed=40, batch_size=32
    )  # the first one is the instruction alone
    assert prefix is not None
    assert prefix.tokens == 39
    assert session.computed == [tuple(range(39))]


def test_what_was_not_used_for_longest_is_given_up() -> None:
    cache = PrefixCache(session := CountingSession(), max_bytes=2 * 40 * 4)

    def use(start: int) -> None:
        assert cache.choose([[*range(start, start + 40), text] for text in (1, 2)], fixed=0, batch_size=32)

    for start in (100, 200, 100, 300):
        use(start)
    assert cache.info()[2:] == (2, 320, 320)
    use(100)
    assert len(session.computed) == 3
    use(200)
    assert len(session.computed) == 4
    too_large = cache.choose([[*range(500, 700), text] for text in (1, 2)], fixed=0, batch_size=32)
    assert too_large is not None
    assert too_large.tokens == 200
    assert cache.info()[2:] == (0, 0, 320)


@pytest.mark.parametrize(
    ("prompts", "length"),
    [([[1, 2, 3]], 3), ([[1, 2], [1, 2, 3]], 2), ([[1, 5], [1, 2, 3], [1, 5, 9]], 1), ([[2], [1]], 0)],
)
def test_common_length(prompts: list[list[int]], length: int) -> None:
    assert common_length(prompts) == length


@pytest.fixture(scope="module")
def bundle(small_models: SmallModels) -> Path:
    return small_models.bundle("qwen2", layout="stepwise", max_tokens=96)


def test_vectors_are_those_of_whole_prompts(bundle: Path) -> None:
    """Texts alone and in a batch, with and without what is kept; FP32 within 1e-5."""
    with Embedder(bundle, prefix_cache=False) as whole, Embedder(bundle) as shared:
        wanted = whole.encode(TEXTS, instruction=INSTRUCTION, all_steps=True)
        assert whole.prefix_cache_info() == PrefixCacheInfo(0, 0, 0, 0, 0)
        for _ in range(2):
            ours = shared.encode(TEXTS, instruction=INSTRUCTION, all_steps=True)
            np.testing.assert_allclose(ours, wanted, atol=1e-5)
        alone = np.stack([shared.encode(text, instruction=INSTRUCTION, all_steps=True) for text in TEXTS])
        np.testing.assert_allclose(alone, wanted, atol=1e-5)
        small_batches = shared.encode(TEXTS, instruction=INSTRUCTION, all_steps=True, batch_size=2)
        np.testing.assert_allclose(small_batches, wanted, atol=1e-5)
        info = shared.prefix_cache_info()
        assert (info.misses, info.hits, info.prefixes) == (2, 7, 2)  # without a text, the instruction lacks its end
        np.testing.assert_allclose(
            shared.encode(TEXTS, prompt=INSTRUCTION), whole.encode(TEXTS, prompt=INSTRUCTION), atol=1e-5
        )
        np.testing.assert_allclose(
            shared.encode([INSTRUCTION + text for text in TEXTS]),
            whole.encode([INSTRUCTION + text for text in TEXTS]),
            atol=1e-5,
        )
        np.testing.assert_allclose(
            shared.encode(TEXTS, instruction=INSTRUCTION, steps=0),
            whole.encode(TEXTS, instruction=INSTRUCTION, steps=0),
            atol=1e-5,
        )
        np.testing.assert_allclose(shared.encode(TEXTS), whole.encode(TEXTS), atol=BATCH_MAX_DIFFERENCE)


def test_windows_share_an_instruction(bundle: Path) -> None:
    texts = [f"{word} is one text" for word in ("this", "that", "a", "my", "the", "our", "no")]
    with Embedder(bundle, prefix_cache=False) as whole, Embedder(bundle) as shared:
        windows = list(shared.encode_iter(texts, window=2, instruction=INSTRUCTION))
        np.testing.assert_allclose(np.concatenate(windows), whole.encode(texts, instruction=INSTRUCTION), atol=1e-5)
        assert shared.prefix_cache_info()[:3] == (3, 1, 1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_prompts_that_are_cut(bundle: Path, side: str) -> None:
    """What is left after a cut on the left does not begin with the instruction."""
    texts = [f"{number} a bundle is written atomically " * 30 for number in range(4)] + ["ok"]
    with Embedder(bundle, prefix_cache=False) as whole, Embedder(bundle) as shared:
        for embedder in (whole, shared):
            object.__setattr__(embedder.tokenizer, "truncation_side", side)
        for _ in range(2):
            np.testing.assert_allclose(
                shared.encode(texts, instruction=INSTRUCTION), whole.encode(texts, instruction=INSTRUCTION), atol=1e-5
            )


def test_several_threads(bundle: Path) -> None:
    with Embedder(bundle, threads=1) as embedder, ThreadPoolExecutor(4) as pool:
        instructions = [f"{INSTRUCTION} {number}" for number in range(3)] * 4
        found = list(pool.map(lambda one: embedder.encode(TEXTS, instruction=one), instructions))
        for one, vectors in zip(instructions, found, strict=True):
            np.testing.assert_allclose(vectors, embedder.encode(TEXTS, instruction=one), atol=1e-5)
        assert embedder.prefix_cache_info().prefixes == 3


def test_an_embedder_that_is_dropped_frees_its_session_at_once(bundle: Path) -> None:
    embedder = Embedder(bundle)
    embedder.encode(TEXTS, instruction=INSTRUCTION)
    session = weakref.ref(embedder._opened.session)
    gc.disable()
    try:
        del embedder
        assert session() is None
    finally:
        gc.enable()
