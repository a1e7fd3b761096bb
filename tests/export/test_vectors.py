"""Every architecture, layout and padding against plain torch, at every step; and controls that must fail."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support.reference_loop import plain_embeddings, plain_states
from support.small_models import CONFIGS, SmallModels
from support.tolerances import (
    BATCH_MAX_DIFFERENCE,
    CONTROL_MIN_DIFFERENCE,
    PROBE_MAX_DIFFERENCE,
    REFERENCE_MAX_DIFFERENCE,
    SMALL_MODEL_MAX_DIFFERENCE,
)
from support.vectors import PROMPTS, STEPS, expected, padded, run

from gircse.checkpoint.reference import load_reference, step_states
from gircse.checkpoint.source import resolve_checkpoint
from gircse.export.exporter import export_bundle
from gircse.export.options import ExportOptions
from gircse.runtime import Embedder
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import l2_normalize
from gircse.runtime.ort_session import load_graph, open_session


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_matches_plain_torch(small_models: SmallModels, name: str, layout: Layout) -> None:
    prompt, steps = expected(small_models.load(name))
    for left in (True, False):
        ours_prompt, ours_steps = run(small_models.bundle(name), layout=layout, left=left)
        assert np.abs(ours_prompt - prompt).max() < SMALL_MODEL_MAX_DIFFERENCE
        assert np.abs(ours_steps - steps).max() < SMALL_MODEL_MAX_DIFFERENCE


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_named_and_those_of_plain_torch(small_models: SmallModels, name: str) -> None:
    """In both graphs, by the names that ``tensor_names`` promises."""
    model, wanted = small_models.load(name), []
    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for layer in model.model.layers:
            hooks.callback(layer.register_forward_hook(lambda _layer, _inputs, output: wanted.append(output[0])).remove)
        embeddings = model.get_input_embeddings()(torch.tensor(PROMPTS[1]))
        model(inputs_embeds=embeddings[None], use_cache=False)
    bundle = Bundle.open(small_models.bundle(name))
    for layout, prefix in ((Layout.UNROLLED, "prompt/"), (Layout.STEPWISE, "decoder/")):
        path = bundle.graph("fp32", layout)
        graph = onnx.load(path, load_external_data=False)
        names = ["prompt/embeddings", *(f"{prefix}layer.{layer}" for layer in range(len(wanted)))]
        graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(one) for one in names)
        session = load_graph(path, content=graph.SerializeToString())
        ids = np.array([PROMPTS[1]])
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for spec in session.get_inputs()[2:]:  # the past, empty in the prompt pass
            feed[spec.name] = np.empty((1, 0, spec.shape[2]), np.float32)
        for ours, theirs in zip(session.run(names, feed), [embeddings, *wanted], strict=True):
            np.testing.assert_allclose(ours[0], theirs.detach(), atol=PROBE_MAX_DIFFERENCE)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(("pooling", "temperature"), [("last", 1.0), ("mean", 0.25)])
def test_pooling_and_temperature(small_models: SmallModels, layout: Layout, pooling: str, temperature: float) -> None:
    model = small_models.load("llama")
    states = [plain_states(model, prompt, STEPS, temperature) for prompt in PROMPTS]
    wanted = torch.stack([plain_embeddings(rows, pooling) for rows in states]).numpy()
    _, ours = run(small_models.bundle("llama", pooling=pooling, temperature=temperature), layout=layout)
    assert np.abs(ours - wanted).max() < SMALL_MODEL_MAX_DIFFERENCE


@pytest.mark.parametrize("layout", ["unrolled", "stepwise"])
@pytest.mark.parametrize("name", ["qwen3", "mistral-linear"])  # an untied lm_head is in the checkpoint for nothing
def test_no_steps_is_the_encoder(small_models: SmallModels, name: str, layout: str) -> None:
    prompt, _ = expected(small_models.load(name), steps=0)
    ours, nothing = run(small_models.bundle(name, steps=0, layout=layout), steps=0)
    assert np.abs(ours - prompt).max() < SMALL_MODEL_MAX_DIFFERENCE
    assert nothing.shape == (len(PROMPTS), 0, 48)


def test_fields_of_how_hugging_face_runs_change_nothing(small_models: SmallModels, tmp_path: Path) -> None:
    """Not the vectors of the bundle, and not the PyTorch reference that they are compared with."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(small_models.checkpoint("gemma3"), checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"attn_implementation": "flash_attention_2", "_attn_implementation": "flash_attention_2"}
    config |= {"return_dict": False, "use_cache": False, "output_attentions": True, "output_hidden_states": True}
    (checkpoint / "config.json").write_text(json.dumps(config))
    export_bundle(ExportOptions(output=tmp_path / "bundle", model=str(checkpoint), steps=STEPS, max_tokens=48))
    report = Embedder(tmp_path / "bundle").self_test()
    assert report.passed
    prompt, steps = expected(small_models.load("gemma3"))
    ours_prompt, ours_steps = run(tmp_path / "bundle")
    assert np.abs(ours_prompt - prompt).max() < SMALL_MODEL_MAX_DIFFERENCE
    assert np.abs(ours_steps - steps).max() < SMALL_MODEL_MAX_DIFFERENCE


def test_embedding_output_is_the_last_step(small_models: SmallModels) -> None:
    import onnxruntime

    bundle = Bundle.open(small_models.bundle("llama"))
    session = onnxruntime.InferenceSession(bundle.file("fp32/model.onnx"))
    ids, mask = padded(PROMPTS, left=True)
    embedding, steps = session.run(["embedding", "step_embeddings"], {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_array_equal(embedding, steps[:, -1])


@pytest.mark.parametrize("name", CONFIGS)
def test_reference_with_cache_matches_plain_torch(small_models: SmallModels, name: str) -> None:
    model = load_reference(resolve_checkpoint(str(small_models.checkpoint(name))))
    ids, mask = (torch.from_numpy(array) for array in padded(PROMPTS, left=True))
    states = step_states(model, ids, mask, steps=STEPS, temperature=1.0)
    wanted = torch.stack([plain_states(model, prompt, STEPS) for prompt in PROMPTS])
    difference = l2_normalize(states.numpy()) - l2_normalize(wanted.numpy())
    assert np.abs(difference).max() < REFERENCE_MAX_DIFFERENCE


@pytest.mark.parametrize("layout", Layout)
def test_golden_vectors_and_self_test(small_models: SmallModels, layout: Layout) -> None:
    report = Embedder(small_models.bundle("mistral-window"), layout=layout).self_test()
    assert report.passed
    assert report.texts == 12
    assert report.max_difference < SMALL_MODEL_MAX_DIFFERENCE


def test_a_text_does_not_depend_on_its_batch(small_models: SmallModels) -> None:
    session = open_session(Bundle.open(small_models.bundle("qwen2")), "fp32", threads=2)
    ids, mask = padded(PROMPTS, left=True, extra=9)
    together = session.run(ids, mask, steps=STEPS).step_embeddings
    for row, prompt in enumerate(PROMPTS):
        alone = session.run(*padded([prompt], left=True, extra=0), steps=STEPS).step_embeddings[0]
        assert np.abs(alone - together[row]).max() < BATCH_MAX_DIFFERENCE


# Negative controls: if one of these passed, the tests above would prove nothing.


def test_control_steps_off_by_one(small_models: SmallModels) -> None:
    _, steps = expected(small_models.load("qwen2"))
    _, ours = run(small_models.bundle("qwen2"))
    for k in range(1, STEPS):
        assert np.abs(ours[:, k] - steps[:, k - 1]).max() > CONTROL_MIN_DIFFERENCE


def test_control_prompt_state_pooled(small_models: SmallModels) -> None:
    model = small_models.load("qwen2")
    states = torch.stack([plain_states(model, prompt, STEPS) for prompt in PROMPTS])
    with_prompt = l2_normalize(states.mean(1).numpy())
    _, ours = run(small_models.bundle("qwen2"))
    assert np.abs(ours[:, -1] - with_prompt).max() > CONTROL_MIN_DIFFERENCE


def test_control_shuffled_weights(small_models: SmallModels, tmp_path: Path) -> None:
    """Swap the weights of the two layers in the graph itself: shapes fit, vectors must not."""
    bundle = tmp_path / "shuffled"
    shutil.copytree(small_models.bundle("qwen2"), bundle)
    path = bundle / "fp32" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    first, second = (weights[f"model.layers.{layer}.mlp.down_proj.weight.T"] for layer in (0, 1))
    first.name, second.name = second.name, first.name
    onnx.save(model, path)
    import onnxruntime

    ids, mask = padded(PROMPTS, left=True)
    ours = onnxruntime.InferenceSession(path).run(["step_embeddings"], {"input_ids": ids, "attention_mask": mask})[0]
    _, steps = expected(small_models.load("qwen2"))
    assert np.abs(ours - steps).max() > CONTROL_MIN_DIFFERENCE


def test_control_gemma_without_its_own(small_models: SmallModels) -> None:
    """Scale of the embeddings, soft cap of the logits: a graph without one of them is far off."""
    changes = {"gemma3": lambda model: model.model.embed_tokens.embed_scale.fill_(1.0)}
    changes["gemma3-softcap-linear"] = lambda model: setattr(model.config, "final_logit_softcapping", None)
    for name, change in changes.items():
        model = small_models.load(name)
        change(model)
        _, steps = expected(model)
        _, ours = run(small_models.bundle(name))
        assert np.abs(ours - steps).max() > CONTROL_MIN_DIFFERENCE


def test_every_weight_is_stored_once(small_models: SmallModels) -> None:
    """One initializer for each tensor of the checkpoint, with its value, however many steps read it."""
    bundle = small_models.bundle("qwen2")
    graph = onnx.load(bundle / "fp32" / "model.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name, weight in small_models.load("qwen2").state_dict().items():
        if name == "lm_head.weight":  # tied
            assert name not in stored
        elif f"{name}.T" in stored:
            np.testing.assert_array_equal(stored[f"{name}.T"], weight.numpy().T)
        else:
            np.testing.assert_array_equal(stored[name], weight.numpy())
    total = sum(parameter.numel() for parameter in small_models.load("qwen2").parameters())
    assert (bundle / "fp32" / "weights.bin").stat().st_size < 4 * total + 4096 * len(stored)
