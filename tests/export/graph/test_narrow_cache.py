"""The KV cache of `int8` in FP16: what is rounded, and that nothing else is."""

import numpy as np
import onnx_ir as ir
import pytest
from support.int8_bundles import int8_bundle
from support.small_models import SmallModels
from support.vectors import PROMPTS, padded

from gircse.export.graph.narrow_cache import narrow_cache
from gircse.runtime import tensor_names
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import ExportError
from gircse.runtime.manifest import Layout
from gircse.runtime.ort_session import load_graph

LAYERS = 2


@pytest.mark.parametrize(
    ("precision", "dtype"), [("int8", "float16"), ("int8-weights", "float32"), ("int4-weights", "float32")]
)
def test_the_manifest_says_what_the_cache_is_made_of(small_models: SmallModels, precision: str, dtype: str) -> None:
    variant = Bundle.open(int8_bundle(small_models, "llama")).manifest.variants[precision]
    graph = variant.graphs[Layout.STEPWISE]
    caches = [spec for spec in (*graph.inputs, *graph.outputs) if tensor_names.is_cache(spec.name)]
    assert len(caches) == 2 * 2 * LAYERS
    assert {spec.dtype for spec in caches} == {dtype}
    assert variant.rewrites[Layout.STEPWISE].get("narrow_cache", 0) == (2 * LAYERS if dtype == "float16" else 0)


def test_keys_and_values_are_rounded_and_nothing_else_is(small_models: SmallModels) -> None:
    """Of the first layer, before whose attention nothing was rounded: what is kept is the FP32 graph's, in FP16."""
    bundle = Bundle.open(small_models.bundle("llama"))
    path = bundle.graph("fp32", Layout.STEPWISE)
    model = ir.load(path)
    assert narrow_cache(model.graph) == 2 * LAYERS
    exact, narrow = load_graph(path), load_graph(path, content=ir.to_proto(model).SerializeToString())
    facts = bundle.manifest.graph
    ids, mask = padded(PROMPTS, left=True)
    names = [tensor_names.NEXT_HIDDEN, *tensor_names.cache_names("present", LAYERS)]
    prompt = {
        tensor_names.INPUT_IDS: ids,
        tensor_names.ATTENTION_MASK: mask,
        tensor_names.HIDDEN: np.empty((len(ids), 0, facts.hidden_size), np.float32),
    }

    def run(graph: object, dtype: type) -> dict[str, np.ndarray]:
        past = np.empty((len(ids), 0, facts.kv_size), dtype)
        feeds = {**prompt, **dict.fromkeys(tensor_names.cache_names("past", LAYERS), past)}
        return dict(zip(names, graph.run(names, feeds), strict=True))  # type: ignore[attr-defined]

    before, after = run(exact, np.float32), run(narrow, np.float16)
    for name in ("present.0.key", "present.0.value"):
        np.testing.assert_array_equal(after[name], before[name].astype(np.float16))
        assert not np.array_equal(after[name].astype(np.float32), before[name]), "nothing was rounded"
    hidden = tensor_names.NEXT_HIDDEN
    assert after[hidden].dtype == np.float32
    assert 0 < np.abs(after[hidden] - before[hidden]).max() < 0.05 * np.abs(before[hidden]).max()


def test_a_cache_of_another_form_is_refused() -> None:
    past, present = (ir.val(f"{kind}.0.key", ir.DataType.FLOAT, ("batch", kind, 4)) for kind in ("past", "present"))
    node = ir.node("Identity", [past], outputs=[present])
    graph = ir.Graph([past], [present], nodes=[node], opset_imports={"": 23})
    with pytest.raises(ExportError, match=r"present\.0\.key is not made by appending to its past"):
        narrow_cache(graph)
