"""Loading an engine."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.engine_rig import MAX_TOKENS, Rig, make_facts, make_manifest, profile
from support.fake_cuda import FakeCuda
from support.fake_tensorrt import FakeTensorRt

from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import BundleError, ProviderError
from gircse.runtime.manifest import Layout
from gircse.runtime.trt.engine import SPARE_BYTES
from gircse.runtime.trt.session import open_tensorrt_session


def test_a_plan_that_tensorrt_refuses(tmp_path: Path) -> None:
    facts = make_facts()
    manifest = make_manifest(facts, Layout.STEPWISE)
    described: Any = SimpleNamespace(graph=facts)
    bundle = Bundle(tmp_path, described)
    cuda = FakeCuda()
    module = FakeTensorRt(cuda, facts, manifest)
    path = tmp_path / "engine.plan"
    path.write_bytes(b"plan of another version")
    match = (
        r"engine.plan is refused by tensorrt 11\.1\.0: magic tag of the plan; .* 8\.9\. Build it again: gircse-build "
    )
    with pytest.raises(BundleError, match=match):
        open_tensorrt_session(bundle, manifest, path, module=module, cuda=cuda)
    path.write_bytes(b"")
    with pytest.raises(BundleError, match=r"engine.plan cannot be read: .*empty.*: gircse-build "):
        open_tensorrt_session(bundle, manifest, path, module=module, cuda=cuda)
    assert cuda.left() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.dtypes.update({"input_ids": m.DataType.FLOAT}),
            "engine.plan: input_ids is of type FLOAT; .* say INT64. ",
        ),
        (lambda m: m.dtypes.update({"hidden": m.DataType.HALF}), "hidden is of type HALF; .* say FLOAT. "),
        (
            lambda m: m.dtypes.update({"present.1.key": m.DataType.FLOAT}),
            "present.1.key is of type FLOAT; .* say HALF. ",
        ),
        (lambda m: m.dtypes.update({"past.0.key": m.DataType.INT64}), "is of type|KV cache of type INT64"),
        (
            lambda m: m.shapes.update({"next_hidden": (-1, 1, 11)}),
            r"next_hidden has shape \(-1, 1, 11\); .* say \(-1, 1, 10\)\. Build it again: gircse-build ",
        ),
        (lambda m: m.shapes.update({"past.0.key": (-1, 6)}), r"past.0.key has shape"),
        (lambda m: setattr(m, "extra_profiles", 1), "the number of optimization profiles is 2; .* say 1. "),
    ],
)
def test_an_engine_that_is_not_the_described_one(
    tmp_path: Path, change: Callable[[FakeTensorRt], None], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        Rig(tmp_path, prepare=change)


def test_an_engine_of_another_bundle(tmp_path: Path) -> None:
    def other(module: FakeTensorRt) -> None:
        module.facts = make_facts(steps=0)

    with pytest.raises(BundleError, match=r"has the inputs .* say .*'hidden'"):
        Rig(tmp_path, prepare=other)


def test_profiles_that_differ_from_the_json(tmp_path: Path) -> None:
    def other(module: FakeTensorRt) -> None:
        module.manifest = make_manifest(
            module.facts, Layout.STEPWISE, [profile(module.facts, Layout.STEPWISE, batch=2)]
        )

    with pytest.raises(BundleError, match="profile all has attention_mask of"):
        Rig(tmp_path, prepare=other)


def test_weights_are_streamed_within_tensorrts_own_budget(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rig = Rig(tmp_path, weight_streaming=True)
    for seed in range(4):
        rig.run(2, 6, seed=seed)
    (engine,) = rig.module.engines
    assert engine.weight_streaming_budget_v2 == 6000
    assert "6000 of 10000 bytes of weights stay on the GPU" in caplog.text
    assert "begin_capture" not in rig.cuda.calls
    rig.session.close()
    with pytest.raises(ProviderError, match=r"weight_streaming_budget_v2 failed: .* Free memory of the GPU"):
        Rig(tmp_path, weight_streaming=True, prepare=lambda module: module.refuse.add("weight_streaming_budget_v2"))


def test_streamed_weights_leave_room_for_the_largest_batch(tmp_path: Path) -> None:
    """TensorRT's own budget takes nearly all that is free, and knows nothing of our buffers."""
    cuda = FakeCuda()

    def open_and_run() -> int:
        rig = Rig(tmp_path, weight_streaming=True, cuda=cuda)
        rig.run(4, MAX_TOKENS)
        (engine,), allocated = rig.module.engines, cuda.allocated
        budget: int = engine.weight_streaming_budget_v2
        rig.session.close()
        assert allocated + budget + SPARE_BYTES <= cuda.free_bytes
        cuda.free_bytes = allocated + SPARE_BYTES + 4000
        return budget

    assert open_and_run() == 6000
    assert 3000 < open_and_run() <= 4000
    cuda.free_bytes -= 5000
    with pytest.raises(ProviderError, match=r"streaming finds 256 MiB free on the GPU; the largest batch alone needs"):
        Rig(tmp_path, weight_streaming=True, cuda=cuda)


def test_weights_that_all_find_room_are_captured(tmp_path: Path) -> None:
    rig = Rig(tmp_path, weight_streaming=True, prepare=lambda module: setattr(module, "automatic_budget", 10000))
    for seed in range(4):
        rig.run(2, 6, seed=seed)
    assert "begin_capture" in rig.cuda.calls


def test_without_weight_streaming_nothing_is_set(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.run(2, 6)
    assert [engine.weight_streaming_budget_v2 for engine in rig.module.engines] == [10000]
