"""Buffers and CUDA graphs of an execution slot, on a simulated GPU that refuses every misuse."""

import pytest
from support.engine_rig import STEPS, MakeRig


def test_one_upload_one_download_and_one_synchronization_a_run(rig: MakeRig) -> None:
    made = rig()
    made.run(3, 7)
    del made.cuda.calls[:]
    made.run(4, 5)
    assert made.cuda.calls == ["make_current", "copy_to_device", "copy_to_host", "synchronize"]


def test_a_prefix_is_copied_once_for_each_tensor_and_doubled_on_the_device(rig: MakeRig) -> None:
    made = rig()
    made.run_after(5, 4, 3)
    calls = made.cuda.calls
    made.run(4, 8)
    del calls[:]
    made.run_after(5, 4, 3)  # four tensors
    computed, run = 1 + calls.index("synchronize", 1 + calls.index("synchronize")), "copy_to_host synchronize".split()
    assert calls[:computed] == ["make_current", "copy_to_device", *run, *4 * ["copy_to_host"], "synchronize"]
    spread = 4 * ["copy_to_device", "copy_on_device", "copy_on_device"]
    assert calls[computed:] == ["make_current", *spread, "copy_to_device", *run]


def test_buffers_are_allocated_once(rig: MakeRig) -> None:
    made = rig()
    for seed in range(4):
        made.run(4, 12, seed=seed)
        made.run(1, 3, seed=seed)
    assert made.cuda.calls.count("malloc") == 5  # inputs, outputs, two caches, scratch
    assert made.cuda.calls.count("malloc_host") == 2
    assert made.cuda.calls.count("create_stream") == 1


def test_a_shape_is_captured_when_it_repeats_and_launched_from_then_on(rig: MakeRig) -> None:
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


def test_tensorrt_for_rtx_captures_itself_in_contexts_of_their_own(rig: MakeRig) -> None:
    made = rig(rtx=True)
    for seed in range(4):
        made.run(3, 7, seed=seed)
        made.run(2, 5, seed=seed)
    assert not {"begin_capture", "end_capture", "launch_graph"} & set(made.cuda.calls)
    assert sum(context.replays for context in made.module.contexts) == 2 * (STEPS + 1)
    assert made.module.enqueued == 8 * (STEPS + 1)


def test_a_longer_run_captures_the_passes_that_a_shorter_one_did_not_run(rig: MakeRig) -> None:
    made = rig()
    for seed, steps in enumerate((1, 1, 3, 2, 3, 0)):
        made.run(3, 7, steps=steps, seed=seed)
    assert made.cuda.calls.count("begin_capture") == STEPS + 1


def test_graphs_are_bounded(rig: MakeRig) -> None:
    made = rig(graph_shapes=2)
    for tokens in (3, 3, 4, 4, 5, 5, 3, 3):
        made.run(2, tokens)
        captured = made.cuda.calls.count("end_capture") - made.cuda.calls.count("destroy_graph")
        assert captured <= 2 * (STEPS + 1)
        assert len([context for context in made.module.contexts if context.flushed == context.version]) <= 9
    assert made.cuda.calls.count("destroy_graph") == 2 * (STEPS + 1)


def test_shapes_that_rarely_repeat_are_not_captured(rig: MakeRig) -> None:
    made = rig(graph_shapes=2)
    for _ in range(3):
        for tokens in range(1, 6):
            made.run(2, tokens)
    assert "begin_capture" not in made.cuda.calls


def test_no_graphs_on_request(rig: MakeRig) -> None:
    made = rig(graph_shapes=0)
    for seed in range(4):
        made.run(2, 6, seed=seed)
    assert "begin_capture" not in made.cuda.calls


@pytest.mark.parametrize("reason", ["refused", "begin_capture", "end_capture"])
def test_a_failed_capture_leaves_plain_passes_and_one_warning(
    rig: MakeRig, caplog: pytest.LogCaptureFixture, reason: str
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


def test_the_least_recently_used_shape_loses_its_graphs(rig: MakeRig) -> None:
    made = rig(graph_shapes=2)
    for tokens in (3, 3, 4, 4, 3, 5, 5):
        made.run(2, tokens)
    launches = made.cuda.calls.count("launch_graph")
    made.run(2, 3)
    made.run(2, 5)
    assert made.cuda.calls.count("launch_graph") == launches + 2 * (STEPS + 1)


def test_contexts_for_graphs_that_take_no_shapes_leave_plain_passes(rig: MakeRig) -> None:
    made = rig()
    made.run(3, 7)
    made.module.refuse_shapes_from = made.module.created
    for seed in range(3):
        made.run(3, 7, seed=seed)
    assert "begin_capture" not in made.cuda.calls


def test_contexts_without_memory_for_graphs_leave_plain_passes(rig: MakeRig) -> None:
    made = rig()
    made.run(3, 7)
    made.module.refuse.add("create_execution_context")
    for seed in range(3):
        made.run(3, 7, seed=seed)
