"""Loading an engine, and planning its passes."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.engine_rig import Rig, make_facts, make_plan, profile
from support.fake_cuda import FakeCuda
from support.fake_tensorrt import FakeTensorRt

from gircse.runtime import tensor_names
from gircse.runtime.errors import BundleError
from gircse.runtime.manifest import Layout
from gircse.runtime.trt.memory_layout import Buffer, BufferPlanner
from gircse.runtime.trt.session import open_tensorrt_session


def test_a_plan_that_tensorrt_refuses(tmp_path: Path) -> None:
    facts = make_facts()
    plan = make_plan(facts, Layout.STEPWISE)
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(graph=facts))
    cuda = FakeCuda()
    module = FakeTensorRt(cuda, facts, plan)
    path = tmp_path / "engine.plan"
    path.write_bytes(b"plan of another version")
    with pytest.raises(
        BundleError, match=r"engine.plan: magic tag of the plan \| .*11.1.0.*\| build it again: gircse-b"
    ):
        open_tensorrt_session(bundle, plan, path, module=module, cuda=cuda)
    path.write_bytes(b"")
    with pytest.raises(BundleError, match=r"engine.plan: .*empty"):
        open_tensorrt_session(bundle, plan, path, module=module, cuda=cuda)
    assert cuda.left() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.dtypes.update({"input_ids": m.DataType.FLOAT}), "input_ids is of type FLOAT .* INT64"),
        (lambda m: m.dtypes.update({"hidden": m.DataType.HALF}), "hidden is of type HALF .* FLOAT"),
        (lambda m: m.dtypes.update({"present.1.key": m.DataType.FLOAT}), "present.1.key is of type FLOAT .* HALF"),
        (lambda m: m.dtypes.update({"past.0.key": m.DataType.INT64}), "is of type|KV cache of INT64"),
        (
            lambda m: m.shapes.update({"next_hidden": (-1, 1, 11)}),
            r"next_hidden has shape \(-1, 1, 11\) .*\(-1, 1, 10\)",
        ),
        (lambda m: m.shapes.update({"past.0.key": (-1, 6)}), r"past.0.key has shape"),
        (lambda m: setattr(m, "extra_profiles", 1), "has optimization profiles: 2 .* 1"),
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

    with pytest.raises(BundleError, match=r"has inputs .* say .*'hidden'"):
        Rig(tmp_path, prepare=other)


def test_profiles_that_differ_from_the_json(tmp_path: Path) -> None:
    def other(module: FakeTensorRt) -> None:
        module.plan = make_plan(module.facts, Layout.STEPWISE, [profile(module.facts, Layout.STEPWISE, batch=2)])

    with pytest.raises(BundleError, match="profile all has attention_mask of"):
        Rig(tmp_path, prepare=other)


@pytest.mark.parametrize("layout", Layout)
def test_passes_fit_their_buffers_and_never_overlap(layout: Layout) -> None:
    planner = BufferPlanner(make_facts(layout), layout, 2)
    sizes = planner.buffer_bytes(4, 12)
    widths = {tensor_names.INPUT_IDS: 8, tensor_names.ATTENTION_MASK: 8}
    for batch, tokens in ((1, 1), (3, 7), (4, 12)):
        for number in range(planner.last_pass + 1):
            planned = planner.plan(batch, tokens, number)
            shapes = {**planned.inputs, **planned.outputs}
            assert set(shapes) == set(planned.places)
            spans: dict[Buffer, list[tuple[int, int]]] = {}
            for name, place in planned.places.items():
                item = widths.get(name, 2 if name.startswith(("past", "present")) else 4)
                end = place.offset + int(np.prod(shapes[name])) * item
                assert end <= sizes[place.buffer]
                spans.setdefault(place.buffer, []).append((place.offset, end))
            for places in spans.values():
                places.sort()
                assert all(a[1] <= b[0] and a[0] < b[0] for a, b in itertools.pairwise(places))
