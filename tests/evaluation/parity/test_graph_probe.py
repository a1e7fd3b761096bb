"""The probe sees what the runtime computes, and feeds the soft tokens that it is given."""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from support.small_models import SmallModels
from support.stub_onnxruntime import CPU, CUDA, StubOnnxRuntime
from support.tolerances import CONTROL_MIN_DIFFERENCE, PROBE_MAX_DIFFERENCE, SMALL_MODEL_MAX_DIFFERENCE

from gircse.evaluation.parity.backends import BundleBackend
from gircse.evaluation.parity.graph_probe import GraphProbe, InnerNames, ProbedGraph, _instrumented
from gircse.evaluation.parity.step_trace import StepTrace
from gircse.runtime import BundleError, ProviderError
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout, Pooling
from gircse.runtime.numerics import l2_normalize, pool_states
from gircse.runtime.provider import Provider


@pytest.mark.parametrize("layout", Layout)
def test_probe_sees_what_the_runtime_computes(
    small_models: SmallModels,
    token_ids: list[list[int]],
    reference: tuple[np.ndarray, StepTrace],
    layout: Layout,
) -> None:
    backend = BundleBackend(Bundle.open(small_models.bundle("llama")), "fp32", layout=layout, threads=2)
    vectors, trace = backend.embed_and_trace(token_ids, lambda _: None)
    np.testing.assert_allclose(l2_normalize(pool_states(trace.states, Pooling.MEAN)), vectors, atol=1e-6)
    np.testing.assert_allclose(vectors, reference[0], atol=SMALL_MODEL_MAX_DIFFERENCE)
    for name in ("states", "soft_tokens"):
        np.testing.assert_allclose(getattr(trace, name), getattr(reference[1], name), atol=PROBE_MAX_DIFFERENCE)
    for name in ("entropy", "top1_mass", "padded_mass", "norm"):
        ours, theirs = (getattr(stats, name) for stats in (trace.stats, reference[1].stats))
        np.testing.assert_allclose(ours, theirs, atol=PROBE_MAX_DIFFERENCE)


@pytest.mark.parametrize("layout", Layout)
def test_teacher_forcing_feeds_the_given_soft_tokens(
    small_models: SmallModels, token_ids: list[list[int]], reference: tuple[np.ndarray, StepTrace], layout: Layout
) -> None:
    probe = GraphProbe(ProbedGraph(Bundle.open(small_models.bundle("llama")), "fp32", layout=layout, threads=2))
    given = np.roll(reference[1].soft_tokens, 1, axis=0)  # each text gets another one's
    states = np.empty_like(reference[1].states)
    for values in probe.refine(token_ids, forced=given, advance=lambda _: None):
        states[values.rows, values.step] = values.state
    assert np.abs(states[:, 1:] - reference[1].states[:, 1:]).max() > CONTROL_MIN_DIFFERENCE
    model = small_models.load("llama")
    table = model.get_input_embeddings().weight
    for row in (3, 11):
        embeds = torch.cat([table[torch.tensor([token_ids[row]])], torch.from_numpy(given[row : row + 1])], dim=1)
        with torch.no_grad():
            wanted = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -6:]
        np.testing.assert_allclose(states[row], wanted, atol=PROBE_MAX_DIFFERENCE)


def test_probe_refuses_graphs_without_names(bundle_copy: Path) -> None:
    path = bundle_copy / "fp32" / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"step1/soft_token", b"step1/soft_tokem"))
    with pytest.raises(BundleError, match=r"has no value step1/soft_token; .* Export the bundle again"):
        GraphProbe(ProbedGraph(Bundle.open(bundle_copy), "fp32", layout=Layout.UNROLLED, threads=1))


@pytest.mark.parametrize("layout", Layout)
def test_what_fails_in_a_run_is_an_error_of_ours(small_models: SmallModels, layout: Layout) -> None:
    probe = GraphProbe(ProbedGraph(Bundle.open(small_models.bundle("llama")), "fp32", layout=layout, threads=2))
    values = probe.refine([[1, 10**6]], advance=lambda _: None)  # the second is outside the vocabulary
    with pytest.raises(ProviderError, match=r"^ONNX Runtime failed in a batch of 1 texts of 2 tokens: "):
        list(values)


@pytest.mark.parametrize("layout", Layout)
def test_probe_on_a_gpu_runs_the_graph_itself(
    small_models: SmallModels, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    """On a stub, whose GPU computes what the CPU does: FP16 is not emulated, and the cache stays on the device."""
    bundle = Bundle.open(small_models.bundle("llama", precisions=("fp32", "fp16")))
    stub = StubOnnxRuntime(CUDA, CPU)
    monkeypatch.setitem(sys.modules, "onnxruntime", stub)
    backend = BundleBackend(bundle, "fp16", layout=layout, provider=Provider.CUDA)
    vectors, trace = backend.embed_and_trace([[5, 6, 7], [8]], lambda _: None)
    assert [asked[0][0] for asked in stub.asked] == [CUDA, CUDA]
    np.testing.assert_allclose(l2_normalize(pool_states(trace.states, Pooling.MEAN)), vectors, atol=1e-6)
    if layout is Layout.STEPWISE:
        assert [set(binding.outputs.values()) for binding in stub.sessions[-1].bindings] == [{"cuda"}] * 6
    forced = backend.trace_and_force([[5, 6, 7], [8]], trace.soft_tokens, lambda _: None)[1]
    np.testing.assert_allclose(forced, trace.states, atol=1e-6)
    zeros = np.zeros_like(trace.soft_tokens)
    others = backend.trace_and_force([[5, 6, 7], [8]], zeros, lambda _: None)[1]
    assert np.abs(others - trace.states).max() > CONTROL_MIN_DIFFERENCE


@pytest.mark.parametrize("layout", Layout)
def test_soft_tokens_of_bf16_are_read_and_fed_in_float32(small_models: SmallModels, layout: Layout) -> None:
    """No CPU runs the graph, so it is only checked: types fit, and everything read has a type of numpy's."""
    bundle = Bundle.open(small_models.bundle("llama", precisions=("fp32", "bf16")))
    path = bundle.graph("bf16", layout)
    prefixes = {"step/"} if layout is Layout.STEPWISE else {f"step{step}/" for step in range(1, 6)}
    inner = InnerNames({f"{prefix}soft_token" for prefix in prefixes}, set())
    model = onnx.load_from_string(_instrumented(path, ir.load(path), inner))
    typed = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in (*typed.graph.input, *typed.graph.output)}
    for prefix in prefixes:
        assert types[f"{prefix}soft_token"] == types[f"{prefix}soft_token.forced"] == onnx.TensorProto.FLOAT
