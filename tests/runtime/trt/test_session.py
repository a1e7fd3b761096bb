"""TensorRtSession against a plain numpy loop, on a simulated GPU that refuses every misuse."""

import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.engine_rig import STEPS, Rig, make_facts, profile, random_batch
from support.fake_cuda import FakeCuda

from gircse.runtime.errors import ProviderError
from gircse.runtime.manifest import GraphFacts, Layout, Pooling
from gircse.runtime.trt.engine_manifest import EngineProfile, Stage

ALWAYS_RAISED = {"malloc", "malloc_host", "create_stream", "copy_to_device", "copy_to_host", "launch_graph"}
"""What no session survives; a failed capture is only slower, and a failed release is only logged."""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """Make rigs; at the end nothing of theirs may be left on the GPU."""
    made: list[Rig] = []

    def make(*args: Any, **options: Any) -> Rig:
        made.append(Rig(tmp_path, *args, **options))
        return made[-1]

    yield make
    for each in made:
        each.session.close()
        each.session.close()
        assert each.cuda.left() == {}
        if each.module.engines:
            gc.collect()  # errors that the test caught may have held on to it
        assert not each.module.engines
        assert not each.module.contexts


@pytest.mark.parametrize("rtx", [False, True])
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("pooling", Pooling)
def test_agrees_with_the_plain_loop(rig: Callable[..., Rig], layout: Layout, pooling: Pooling, rtx: bool) -> None:
    made = rig(layout, facts=make_facts(layout, pooling=pooling), rtx=rtx)
    for seed in range(2):
        for batch, tokens, steps in ((1, 1, 3), (3, 7, 2), (4, 12, 3), (2, 5, 0), (4, 12, 1)):
            made.run(batch, tokens, steps=steps if layout is Layout.STEPWISE else STEPS, seed=seed)


@pytest.mark.parametrize("cache_type", ["FLOAT", "HALF", "BF16"])
def test_cache_of_every_type(rig: Callable[..., Rig], cache_type: str) -> None:
    rig(cache_type=cache_type).run(3, 9)


@pytest.mark.parametrize("layout", Layout)
def test_without_refinement_steps(rig: Callable[..., Rig], layout: Layout) -> None:
    made = rig(layout, facts=make_facts(layout, steps=0))
    for seed in range(3):
        made.run(2, 6, steps=0, seed=seed)


def test_unrolled_engine_runs_all_steps_and_gives_the_first(rig: Callable[..., Rig]) -> None:
    made = rig(Layout.UNROLLED)
    ids, mask = random_batch(2, 6, 0)
    full = made.session.run(ids, mask, steps=STEPS)
    np.testing.assert_array_equal(made.session.run(ids, mask, steps=1).step_embeddings, full.step_embeddings[:, :1])


def test_one_upload_one_download_and_one_synchronization_a_run(rig: Callable[..., Rig]) -> None:
    made = rig()
    made.run(3, 7)
    del made.cuda.calls[:]
    made.run(4, 5)
    assert made.cuda.calls == ["make_current", "copy_to_device", "copy_to_host", "synchronize"]


def test_buffers_are_allocated_once(rig: Callable[..., Rig]) -> None:
    made = rig()
    for seed in range(4):
        made.run(4, 12, seed=seed)
        made.run(1, 3, seed=seed)
    assert made.cuda.calls.count("malloc") == 5  # inputs, outputs, two caches, scratch
    assert made.cuda.calls.count("malloc_host") == 2
    assert made.cuda.calls.count("create_stream") == 1


@pytest.mark.parametrize("layout", Layout)
def test_outputs_belong_to_the_caller(rig: Callable[..., Rig], layout: Layout) -> None:
    made = rig(layout)
    first = made.run(3, 7, seed=1)
    kept = [array.copy() for array in first]
    made.run(3, 7, seed=2)
    made.session.close()
    for array, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(array, copy)
        array[:] = 0.0


# --- CUDA graphs


def test_a_shape_is_captured_when_it_comes_again_and_launched_from_then_on(rig: Callable[..., Rig]) -> None:
    made = rig()
    enqueued, captures, launches = [], [], []
    for seed in range(4):
        made.run(3, 7, seed=seed)
        if seed == 3:
            made.run(3, 7, steps=1, seed=seed)
        enqueued.append(made.module.enqueued)
        captures.append(made.cuda.calls.count("begin_capture"))
        launches.append(made.cuda.calls.count("launch_graph"))
    passes = STEPS + 1
    assert enqueued == [passes, 3 * passes, 3 * passes, 3 * passes]
    assert captures == [0, passes, passes, passes]
    assert launches == [0, 0, passes, 2 * passes + 2]


def test_tensorrt_for_rtx_captures_itself_in_contexts_of_their_own(rig: Callable[..., Rig]) -> None:
    made = rig(rtx=True)
    for seed in range(4):
        made.run(3, 7, seed=seed)
        made.run(2, 5, seed=seed)
    assert not {"begin_capture", "end_capture", "launch_graph"} & set(made.cuda.calls)
    assert sum(context.replays for context in made.module.contexts) == 2 * (STEPS + 1)
    assert made.module.enqueued == 8 * (STEPS + 1)


def test_a_longer_run_captures_what_a_shorter_one_left(rig: Callable[..., Rig]) -> None:
    made = rig()
    for seed, steps in enumerate((1, 1, 3, 2, 3, 0)):
        made.run(3, 7, steps=steps, seed=seed)
    assert made.cuda.calls.count("begin_capture") == STEPS + 1


def test_graphs_are_bounded(rig: Callable[..., Rig]) -> None:
    made = rig(graph_shapes=2)
    for tokens in (3, 3, 4, 4, 5, 5, 3, 3):
        made.run(2, tokens)
        captured = made.cuda.calls.count("end_capture") - made.cuda.calls.count("destroy_graph")
        assert captured <= 2 * (STEPS + 1)
        assert len([context for context in made.module.contexts if context.flushed == context.version]) <= 9
    assert made.cuda.calls.count("destroy_graph") == 2 * (STEPS + 1)


def test_what_rarely_comes_back_is_not_captured(rig: Callable[..., Rig]) -> None:
    made = rig(graph_shapes=2)
    for _ in range(3):
        for tokens in range(1, 6):
            made.run(2, tokens)
    assert "begin_capture" not in made.cuda.calls


def test_no_graphs_on_request(rig: Callable[..., Rig]) -> None:
    made = rig(graph_shapes=0)
    for seed in range(4):
        made.run(2, 6, seed=seed)
    assert "begin_capture" not in made.cuda.calls


@pytest.mark.parametrize("reason", ["refused", "begin_capture", "end_capture"])
def test_a_failed_capture_leaves_plain_passes_and_one_warning(
    rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    made = rig()
    made.run(3, 7)
    if reason == "refused":
        made.module.refuse_captures = True
    else:
        made.cuda.fail_at = len(made.cuda.calls) + {"begin_capture": 2, "end_capture": 3}[reason]
    for seed in range(4):
        made.run(3, 7, seed=seed)
        made.run(2, 5, seed=seed)
    assert made.cuda.failed == (None if reason == "refused" else reason)
    assert made.cuda.calls.count("begin_capture") == 1
    assert sum("no CUDA graphs" in record.message for record in caplog.records) == 1


def test_the_shape_that_was_not_used_for_longest_loses_its_graphs(rig: Callable[..., Rig]) -> None:
    made = rig(graph_shapes=2)
    for tokens in (3, 3, 4, 4, 3, 5, 5):
        made.run(2, tokens)
    launches = made.cuda.calls.count("launch_graph")
    made.run(2, 3)
    made.run(2, 5)
    assert made.cuda.calls.count("launch_graph") == launches + 2 * (STEPS + 1)


def test_contexts_for_graphs_that_take_no_shapes_leave_plain_passes(rig: Callable[..., Rig]) -> None:
    made = rig()
    made.run(3, 7)
    made.module.refuse_shapes_from = made.module.created
    for seed in range(3):
        made.run(3, 7, seed=seed)
    assert "begin_capture" not in made.cuda.calls


def test_contexts_without_memory_for_graphs_leave_plain_passes(rig: Callable[..., Rig]) -> None:
    made = rig()
    made.run(3, 7)
    made.module.refuse.add("create_execution_context")
    for seed in range(3):
        made.run(3, 7, seed=seed)


# --- profiles


def stages(facts: GraphFacts) -> list[EngineProfile]:
    return [
        profile(facts, Layout.STEPWISE, name=name, stage=stage, batch=batch, tokens=tokens)
        for name, stage, batch, tokens in (
            ("throughput", Stage.ANY, 8, (4, 12)),
            ("prompt-1", Stage.PROMPT, 1, (3, 12)),
            ("step-1", Stage.STEP, 1, (3, 12)),
            ("prompt-4", Stage.PROMPT, 4, (3, 9)),
            ("step-4", Stage.STEP, 4, (3, 9)),
        )
    ]


@pytest.mark.parametrize(
    ("batch", "tokens", "expected"),
    [(1, 5, {1, 2}), (3, 9, {3, 4}), (4, 1, {3, 4}), (2, 10, {0}), (8, 2, {0}), (1, 12, {1, 2})],
)
def test_chooses_the_stage_then_the_smallest_batch(
    rig: Callable[..., Rig], batch: int, tokens: int, expected: set[int]
) -> None:
    made = rig(profiles=stages(make_facts()))
    made.run(batch, tokens)
    assert {context.index for context in made.module.contexts} == expected


def test_switches_between_profiles(rig: Callable[..., Rig]) -> None:
    made = rig(profiles=stages(make_facts()))
    for seed in range(4):
        for batch, tokens in ((1, 5), (3, 9), (8, 2), (4, 1)):
            made.run(batch, tokens, seed=seed)


def test_largest_batch_of_a_width(rig: Callable[..., Rig]) -> None:
    session = rig(profiles=stages(make_facts())[1:]).session
    assert [session.max_batch(tokens) for tokens in (1, 9, 10, 12, 13)] == [4, 4, 1, 1, 0]


def test_a_batch_that_no_profile_takes(rig: Callable[..., Rig]) -> None:
    made = rig()
    ids, mask = random_batch(5, 7, 0)
    with pytest.raises(ValueError, match=r"input_ids: shape \(5, 7\) .*batch 1..4, tokens 1..12 .*gircse-build bundle"):
        made.session.run(ids, mask, steps=1)
    with pytest.raises(ValueError, match=r"input_ids: shape \(2, 13\)"):
        made.session.run(*random_batch(2, 13, 0), steps=1)
    with pytest.raises(ValueError, match=r"input_ids: shape \(2, 0\)"):
        made.session.run(ids[:2, :0], mask[:2, :0], steps=1)
    made.run(4, 12)


@pytest.mark.parametrize(
    ("ids", "mask", "steps", "message"),
    [
        (np.zeros((2, 3), np.int32), np.ones((2, 3), np.int64), 1, "input_ids: .*int32"),
        (np.zeros((2, 3), np.int64), np.ones(3, np.int64), 1, "attention_mask: shape"),
        (np.zeros((2, 3), np.int64), np.ones((2, 4), np.int64), 1, r"attention_mask: shape \(2, 4\)"),
        (np.zeros((2, 3), np.int64), np.ones((2, 3), np.int64), 4, r"steps: 4 \| 0..3"),
        (np.zeros((2, 3), np.int64), np.ones((2, 3), np.int64), -1, "steps: -1"),
    ],
)
def test_refuses_wrong_arguments(rig: Callable[..., Rig], ids: Any, mask: Any, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rig().session.run(ids, mask, steps=steps)


# --- threads and lifetime


def test_threads_have_lanes_of_their_own(rig: Callable[..., Rig]) -> None:
    made = rig(profiles=stages(make_facts()))
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


def test_a_caller_gets_a_second_lane_while_the_first_is_busy(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_close_during_a_run_frees_at_its_end(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    made = rig()
    synchronize = made.cuda.synchronize

    def close_first(stream: int) -> None:
        made.session.close()
        synchronize(stream)

    monkeypatch.setattr(made.cuda, "synchronize", close_first)
    made.run(3, 7)
    assert made.cuda.left() == {}
    with pytest.raises(ValueError, match="run after close"):
        made.run(3, 7)


def test_another_thread_may_close(rig: Callable[..., Rig]) -> None:
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


# --- failures


def test_every_cuda_call_that_fails_is_told_and_leaks_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One fault at each call in turn of a session that runs plainly, captures, evicts, launches and closes."""
    failed: set[str | None] = set()
    for index in itertools.count():
        caplog.clear()
        cuda = FakeCuda(fail_at=index)
        told = []
        try:
            made = Rig(tmp_path, graph_shapes=1, cuda=cuda)
        except ProviderError as err:
            told.append(str(err))
        else:
            for tokens in (5, 5, 5, 6, 6, 6):
                try:
                    made.run(2, tokens, steps=1)
                except ProviderError as err:
                    told.append(str(err))
            made.session.close()
        assert cuda.left() == {}, cuda.failed
        if cuda.failed is None:
            assert told == []
            break
        assert len(told) == 1 or (not told and cuda.failed not in ALWAYS_RAISED), cuda.failed
        told += [record.getMessage() for record in caplog.records]
        assert any(f"{cuda.failed}: injected" in text for text in told)
        failed.add(cuda.failed)
    assert failed == set(cuda.calls)
    assert {"begin_capture", "launch_graph", "destroy_graph"} <= set(cuda.calls)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("create_execution_context", "create_execution_context: None"),
        ("set_optimization_profile_async", "optimization profile 0: False"),
        ("set_input_shape", r"input_ids: shape \(2, 6\)"),
        ("set_tensor_address", "input_ids: address 0x7f"),
        ("infer_shapes", "infer_shapes: sizes of a concatenation"),
        ("infer_shapes of past", r"infer_shapes: \['past.0.key'\] are unset"),
        ("get_tensor_shape", r"next_hidden: shape \(1, 2, 3\) \| \(2, 1, 10\)"),
        ("execute_async_v3", "execute_async_v3: a kernel failed"),
    ],
)
def test_every_tensorrt_call_that_fails_is_told(rig: Callable[..., Rig], call: str, message: str) -> None:
    made = rig()
    made.module.refuse.add(call)
    with pytest.raises(ProviderError, match=message):
        made.run(2, 6)
    assert made.cuda.left() == {}
    made.module.refuse.clear()
    made.run(2, 6)


def test_rtx_without_a_runtime_configuration(rig: Callable[..., Rig]) -> None:
    made = rig(rtx=True)
    made.module.refuse.add("create_runtime_config")
    with pytest.raises(ProviderError, match="create_runtime_config: None"):
        made.run(2, 6)
