"""Where the tensors of every pass lie."""

import itertools

import numpy as np
import pytest
from support.engine_rig import make_facts

from gircse.runtime import tensor_names
from gircse.runtime.manifest import Layout
from gircse.runtime.trt.memory_layout import Buffer, MemoryLayout


@pytest.mark.parametrize("layout", Layout)
def test_passes_fit_their_buffers_and_never_overlap(layout: Layout) -> None:
    memory = MemoryLayout(make_facts(layout), layout, 2)
    sizes = memory.buffer_bytes(4, 12)
    widths = {tensor_names.INPUT_IDS: 8, tensor_names.ATTENTION_MASK: 8}
    prefixes = {Layout.UNROLLED: (0,), Layout.STEPWISE: (0, 1, 6)}[layout]
    for (batch, tokens), prefix in itertools.product(((1, 1), (3, 7), (4, 12)), prefixes):
        if prefix >= tokens:
            continue
        for number in range(memory.last_pass + 1):
            bindings = memory.bindings(batch, tokens, number, prefix=prefix)
            shapes = {**bindings.inputs, **bindings.outputs}
            assert set(shapes) == set(bindings.places)
            spans: dict[Buffer, list[tuple[int, int]]] = {}
            for name, place in bindings.places.items():
                item = widths.get(name, 2 if name.startswith(("past", "present")) else 4)
                end = place.offset + int(np.prod(shapes[name])) * item
                assert end <= sizes[place.buffer]
                spans.setdefault(place.buffer, []).append((place.offset, end))
            for places in spans.values():
                places.sort()
                assert all(a[1] <= b[0] and a[0] < b[0] for a, b in itertools.pairwise(places))
