"""TensorRtSession against a plain numpy loop, on a simulated GPU that refuses every misuse."""

import gc
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.engine_rig import STEPS, MakeRig, Rig, make_facts, random_batch, stage_profiles
from support.fake_cuda import FakeCuda

from gircse.runtime.errors import OptionError, ProviderError
from gircse.runtime.manifest import Layout, Pooling
from gircse.runtime.prefix_cache import PrefixCache

ALWAYS_RAISED = {
    "malloc",
    "malloc_host",
    "create_stream",
    "copy_to_device",
    "copy_to_host",
    "copy_on_device",
    "launch_graph",
}
"""What no session survives; a failed capture is only slower, and a failed release is only logged."""


@pytest.mark.parametrize("rtx", [False, True])
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("pooling", Pooling)
def test_agrees_with_the_plain_loop(rig: MakeRig, layout: Layout, pooling: Pooling, rtx: bool) -> None:
    made = rig(layout, facts=make_facts(layout, pooling=pooling), rtx=rtx)
    for seed in range(2):
        for batch, tokens, steps in ((1, 1, 3), (3, 7, 2), (4, 12, 3), (2, 5, 0), (4, 12, 1)):
            made.run(batch, tokens, steps=steps if layout is Layout.STEPWISE else STEPS, seed=seed)


@pytest.mark.parametrize("cache_type", ["FLOAT", "HALF", "BF16"])
def test_cache_of_every_type(rig: MakeRig, cache_type: str) -> None:
    rig(cache_type=cache_type).run(3, 9)


@pytest.mark.parametrize("rtx", [False, True])
@pytest.mark.parametrize("cache_type", ["FLOAT", "HALF", "BF16"])
def test_after_a_prefix_vectors_are_those_of_whole_prompts(rig: MakeRig, cache_type: str, rtx: bool) -> None:
    """Between whole prompts of the same width, and often enough to be captured."""
    made = rig(cache_type=cache_type, rtx=rtx, graph_shapes=3)
    assert made.session.takes_prefixes
    for seed in range(3):
        made.run_after(5, 3, 7, seed=seed)
        made.run(3, 12, seed=seed)
        made.run_after(5, 1, 7, steps=1, seed=seed)
        made.run_after(11, 4, 1, steps=0, seed=seed)
        made.run_after(1, 2, 4, seed=seed)
    prefix = made.session.compute_prefix([7, 8, 9])
    assert [value.shape for value in prefix] == [(1, 3, 24 if cache_type == "FLOAT" else 12)] * 4


def test_prefixes_of_a_cache(rig: MakeRig) -> None:
    """What is kept stays as it is while other prompts run."""
    made = rig()
    cache, prompts = PrefixCache(made.session), [[*range(9), text] for text in range(30)]
    for _ in range(2):
        prefix = cache.choose(prompts, fixed=0, batch_size=30)
        assert prefix is not None
        own = np.array(prompts[:4])[:, prefix.tokens :]
        outputs = prefix.run(own, np.ones_like(own), steps=2)
        made.check(outputs, np.array(prompts[:4]), np.ones((4, 10), np.int64), steps=2)
        made.run(4, 12)
    assert cache.info()[:2] == (1, 1)


@pytest.mark.parametrize("layout", Layout)
def test_without_refinement_steps(rig: MakeRig, layout: Layout) -> None:
    made = rig(layout, facts=make_facts(layout, steps=0))
    for seed in range(3):
        made.run(2, 6, steps=0, seed=seed)


def test_unrolled_engine_runs_all_steps_and_gives_the_first(rig: MakeRig) -> None:
    made = rig(Layout.UNROLLED)
    ids, mask = random_batch(2, 6, 0)
    full = made.session.run(ids, mask, steps=STEPS)
    np.testing.assert_array_equal(made.session.run(ids, mask, steps=1).step_embeddings, full.step_embeddings[:, :1])


@pytest.mark.parametrize("layout", Layout)
def test_outputs_belong_to_the_caller(rig: MakeRig, layout: Layout) -> None:
    made = rig(layout)
    first = made.run(3, 7, seed=1)
    kept = [array.copy() for array in first]
    made.run(3, 7, seed=2)
    made.session.close()
    for array, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(array, copy)
        array[:] = 0.0


@pytest.mark.parametrize(
    ("ids", "mask", "steps", "message"),
    [
        (np.zeros((2, 3), np.int32), np.ones((2, 3), np.int64), 1, r"^input_ids has shape \(2, 3\) and type int32; "),
        (
            np.zeros((2, 3), np.int64),
            np.ones(3, np.int64),
            1,
            r"^attention_mask has shape \(3,\) and .*\(batch, tokens\)",
        ),
        (
            np.zeros((2, 3), np.int64),
            np.ones((2, 4), np.int64),
            1,
            r"^attention_mask has shape \(2, 4\); input_ids has shape \(2, 3\)\.$",
        ),
        (np.zeros((2, 3), np.int64), np.ones((2, 3), np.int64), 4, r"^steps is 4; the engine was built for 0\.\.3\.$"),
        (np.zeros((2, 3), np.int64), np.ones((2, 3), np.int64), -1, "^steps is -1; "),
    ],
)
def test_refuses_wrong_arguments(rig: MakeRig, ids: Any, mask: Any, steps: int, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rig().session.run(ids, mask, steps=steps)


def test_threads_have_slots_of_their_own(rig: MakeRig) -> None:
    made = rig(profiles=stage_profiles(make_facts()))
    inside = threading.Barrier(4, timeout=20)

    def work(index: int) -> None:
        inside.wait()
        for seed in range(6):
            made.run(1 + (index + seed) % 4, 3 + seed % 2, seed=index)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, index) for index in range(4)]:
            future.result()
    assert 1 <= made.cuda.calls.count("create_stream") <= 4
    made.run(2, 5)


def test_a_caller_gets_a_second_slot_while_the_first_is_busy(rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    made = rig()
    synchronize, nested = made.cuda.synchronize, []

    def synchronize_after_another_run(stream: int) -> None:
        if not nested:
            nested.append(stream)
            made.run(2, 4)
        synchronize(stream)

    monkeypatch.setattr(made.cuda, "synchronize", synchronize_after_another_run)
    made.run(3, 7)
    assert made.cuda.calls.count("create_stream") == 2


def test_close_during_a_run_frees_at_its_end(rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    made = rig()
    synchronize = made.cuda.synchronize

    def close_first(stream: int) -> None:
        made.session.close()
        synchronize(stream)

    monkeypatch.setattr(made.cuda, "synchronize", close_first)
    made.run(3, 7)
    assert made.cuda.left() == {}
    with pytest.raises(ValueError, match="session is closed"):
        made.run(3, 7)


def test_another_thread_may_close(rig: MakeRig) -> None:
    made = rig()
    made.run(3, 7)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(made.session.close).result()
    assert made.cuda.left() == {}


def test_a_dropped_session_frees_the_gpu(tmp_path: Path) -> None:
    made = Rig(tmp_path)
    made.run(3, 7)
    made.run(3, 7)
    cuda = made.cuda
    del made
    gc.collect()
    assert cuda.left() == {}


def test_leaving_the_context_frees_the_gpu(tmp_path: Path) -> None:
    made = Rig(tmp_path)
    with made.session:
        made.run(3, 7)
        assert made.cuda.left()
    assert made.cuda.left() == {}


def test_every_cuda_call_that_fails_is_reported_and_leaks_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One fault at each call in turn of a session that does all that it can: it captures, evicts, takes a prefix."""
    failed: set[str | None] = set()
    for index in itertools.count():
        caplog.clear()
        cuda = FakeCuda(fail_at=index)
        reported = []
        try:
            made = Rig(tmp_path, graph_shapes=1, cuda=cuda)
        except ProviderError as err:
            reported.append(str(err))
        else:
            for tokens in (5, 5, 5, 6, 6, 6):
                try:
                    made.run(2, tokens, steps=1)
                except ProviderError as err:
                    reported.append(str(err))
            try:
                made.run_after(2, 2, 3, steps=1)
            except ProviderError as err:
                reported.append(str(err))
            made.session.close()
        assert cuda.left() == {}, cuda.failed
        if cuda.failed is None:
            assert reported == []
            break
        assert len(reported) == 1 or (not reported and cuda.failed not in ALWAYS_RAISED), cuda.failed
        reported += [record.getMessage() for record in caplog.records]
        assert any(f"{cuda.failed} failed: injected" in text for text in reported)
        failed.add(cuda.failed)
    assert failed == set(cuda.calls)
    assert {"begin_capture", "launch_graph", "destroy_graph"} <= set(cuda.calls)
