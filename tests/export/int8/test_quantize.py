"""INT8 variants: the exported graphs compute what the calibration's PyTorch model of them computes, text by text."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.int8_bundles import INT8, MODELS, export, int8_bundle, rounded_weights, run, written
from support.small_models import SmallModels
from support.tolerances import (
    CONTROL_MIN_DIFFERENCE,
    INT8_BATCH_MAX_DIFFERENCE,
    INT8_FAKE_MIN_COSINE,
    INT8_FIRST_STEP_MIN_COSINE,
    INT8_MIN_COSINE,
    INT8_PROMPT_MIN_COSINE,
    INT8_TWO_LIMBS_FAKE_MIN_COSINE,
)
from support.vectors import PROMPTS, STEPS, padded

from gircse.calibration.calibration_file import Calibration
from gircse.calibration.int8.fake_quantization import quantized
from gircse.calibration.int8.scheme import LIMBS, InputKind, QuantizedInput, decoder_inputs
from gircse.calibration.moments_file import moments_path
from gircse.checkpoint.reference import refine
from gircse.evaluation.parity.options import ParityOptions
from gircse.evaluation.parity.run import measure_parity
from gircse.runtime import Embedder
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import CalibrationError, OptionError
from gircse.runtime.numerics import l2_normalize, row_cosine


def fake_prompt_state(small_models: SmallModels, name: str, inputs: tuple[QuantizedInput, ...]) -> np.ndarray:
    """Return h_0 of the PyTorch model with some inputs quantized."""
    model = small_models.load(name)
    calibration = Calibration.read(small_models.calibration(name, steps=STEPS))
    ids, mask = map(torch.from_numpy, padded(PROMPTS, left=True, extra=0))
    weights = rounded_weights(model, inputs, small_models.calibration(name, steps=STEPS))
    variation = quantized(inputs, calibration.inputs, weights.__getitem__, None)
    with variation.changed(model, "", slice(None)):
        state = next(iter(refine(model, ids, mask, steps=0, temperature=1.0)))
    return l2_normalize(state.hidden.numpy())


@pytest.mark.parametrize("kind", list(InputKind)[:4])
@pytest.mark.parametrize("name", ["llama", "llama-biased-llama3", "qwen3"])
def test_graph_is_what_the_sensitivity_measured(
    small_models: SmallModels, tmp_path: Path, name: str, kind: InputKind
) -> None:
    """One kind at a time, in the prompt: these models amplify the one rounding in a thousand that differs."""
    inputs = decoder_inputs(2)
    original = small_models.calibration(name, steps=STEPS)
    content = json.loads(original.read_text())
    content["sensitivity"]["excluded"] = [entry.name for entry in inputs if entry.kind is not kind]
    calibration = written(content, original, tmp_path)
    bundle = export(small_models, tmp_path / "bundle", calibration, model=name)
    chosen = tuple(entry for entry in inputs if entry.kind is kind)
    ours, fake = run(bundle, "int8")[:, 0], fake_prompt_state(small_models, name, chosen)
    limit = INT8_FAKE_MIN_COSINE if LIMBS[kind] == 1 else INT8_TWO_LIMBS_FAKE_MIN_COSINE
    assert row_cosine(ours, fake).min() > limit
    exact = run(int8_bundle(small_models, name), "fp32")[:, 0]
    assert row_cosine(ours, exact).min() < row_cosine(ours, fake).min(), "nothing was quantized"


@pytest.mark.parametrize("precision", INT8)
@pytest.mark.parametrize("name", MODELS)
def test_every_variant_stays_near_fp32(small_models: SmallModels, name: str, precision: str) -> None:
    bundle = int8_bundle(small_models, name)
    cosines = row_cosine(run(bundle, precision), run(bundle, "fp32"))
    assert cosines[:, 0].min() > INT8_PROMPT_MIN_COSINE[precision]
    assert cosines[:, 1].min() > INT8_FIRST_STEP_MIN_COSINE[precision]
    if name != "qwen3":  # its random weights amplify any error: see the tolerance
        assert cosines.min() > INT8_MIN_COSINE[precision]


@pytest.mark.parametrize("precision", INT8)
def test_a_text_does_not_depend_on_its_neighbors(small_models: SmallModels, precision: str) -> None:
    bundle = int8_bundle(small_models, "llama")
    together = run(bundle, precision)
    for row, prompt in enumerate(PROMPTS):
        assert np.abs(run(bundle, precision, [prompt])[0] - together[row]).max() < INT8_BATCH_MAX_DIFFERENCE


@pytest.mark.parametrize("precision", INT8)
def test_what_the_neighbors_say_changes_no_bit(small_models: SmallModels, precision: str) -> None:
    """A scale that is taken over a batch would show here: in a batch of one shape nothing else can."""
    bundle = int8_bundle(small_models, "llama")
    loud = [PROMPTS[0], *([(token * 37 + 11) % 500 for token in prompt] for prompt in PROMPTS[1:])]
    first, second = run(bundle, precision), run(bundle, precision, loud)
    assert np.array_equal(first[0], second[0])
    assert not np.array_equal(first[1], second[1])


def test_weights_are_integers_and_stored_once(small_models: SmallModels) -> None:
    bundle = int8_bundle(small_models, "llama")
    for precision in INT8:
        graph = onnx.load(bundle / precision / "stepwise.onnx", load_external_data=False).graph
        weights = [tensor for tensor in graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) > 8]
        low = [tensor for tensor in weights if tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.INT4)]
        assert {t.name for t in weights} - {t.name for t in low} <= {"rotary.cos", "rotary.sin"} | {
            t.name for t in weights if t.name.endswith(".scale")
        }
        used = [name for node in graph.node for name in node.input]
        table = "model.embed_tokens.int8"  # looked up twice, for the prompt and the soft token, besides the flat branch
        assert all(used.count(tensor.name) == (2 if tensor.name == table else 1) for tensor in low)
        assert not (bundle / precision / "model.onnx").exists()
        assert (bundle / precision / "calibration.json").is_file()


def test_variants_are_standard_onnx(small_models: SmallModels) -> None:
    bundle = int8_bundle(small_models, "llama")
    for precision in INT8:
        model = onnx.load(bundle / precision / "stepwise.onnx", load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}
        onnx.checker.check_model(str(bundle / precision / "stepwise.onnx"))


def edited(path: Path, tmp_path: Path, **inputs: dict[str, object]) -> Path:
    content = json.loads(path.read_text())
    for name, fields in inputs.items():
        content["inputs"][name].update(fields)
    return written(content, path, tmp_path)


def test_a_wrong_scale_is_noticed(small_models: SmallModels, tmp_path: Path) -> None:
    path = small_models.calibration("llama", steps=STEPS)
    thresholds = Calibration.read(path).inputs["model.layers.1.mlp_input"].thresholds
    wrong = edited(path, tmp_path, **{"model.layers.1.mlp_input": {"thresholds": [t / 20 for t in thresholds]}})
    ours = run(export(small_models, tmp_path / "wrong", wrong), "int8")
    assert np.abs(ours - run(int8_bundle(small_models, "llama"), "int8")).max() > CONTROL_MIN_DIFFERENCE


def test_an_input_of_zero_range_is_exported(small_models: SmallModels, tmp_path: Path) -> None:
    path = small_models.calibration("llama", steps=STEPS)
    zero = {"thresholds": [0.0] * (STEPS + 1), "ranges": [0.0] * (STEPS + 1), "smoothing": [], "outlier_channels": []}
    ours = run(
        export(small_models, tmp_path / "zero", edited(path, tmp_path, **{"model.layers.0.attention_output": zero})),
        "int8",
    )
    assert np.isfinite(ours).all()


def test_excluded_inputs_stay_in_float(small_models: SmallModels, tmp_path: Path) -> None:
    original = small_models.calibration("llama", steps=STEPS)
    content = json.loads(original.read_text())
    every = [entry.name for entry in decoder_inputs(2)]
    exact = run(int8_bundle(small_models, "llama"), "fp32")
    far = np.abs(run(int8_bundle(small_models, "llama"), "int8") - exact).max()
    for excluded in (every[:1], ["model.layers.0.mlp_input"], ["model.layers.0.mlp_output"], ["lm_head"], every[1:]):
        content["sensitivity"]["excluded"] = excluded
        calibration = written(content, original, tmp_path)
        bundle = export(small_models, tmp_path / "excluded", calibration, force=True)
        assert set(excluded) <= set(Bundle.open(bundle).manifest.variants["int8"].float32)
        assert np.abs(run(bundle, "int8") - exact).max() < max(4 * far, 0.1), excluded
    content["sensitivity"]["excluded"] = every
    calibration = written(content, original, tmp_path)
    with pytest.raises(CalibrationError, match="excludes every input from quantization"):
        export(small_models, tmp_path / "none", calibration)


def test_int8_needs_a_calibration_of_this_model(small_models: SmallModels, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"needs a --calibration\. .* gircse-calibrate --steps 5"):
        export(small_models, tmp_path / "a", None)
    with pytest.raises(CalibrationError, match=r"config\.json with SHA-256"):
        export(small_models, tmp_path / "a", small_models.calibration("qwen2", steps=STEPS))
    with pytest.raises(CalibrationError, match=r"steps 5; this export has 3\."):
        export(small_models, tmp_path / "a", small_models.calibration("llama", steps=STEPS), steps=3)
    with pytest.raises(CalibrationError, match=r"pooling mean; this export has last\."):
        export(small_models, tmp_path / "a", small_models.calibration("llama", steps=STEPS), pooling="last")
    assert not (tmp_path / "a").exists()


def test_moments_of_another_calibration(small_models: SmallModels, tmp_path: Path) -> None:
    """Both files of one calibration, or nothing."""
    path = tmp_path / "calibration.json"
    shutil.copy(small_models.calibration("llama", steps=STEPS), path)
    message = r"needs calibration\.moments\.safetensors next to it, which cannot be read: No such file .* copy both\."
    with pytest.raises(CalibrationError, match=message):
        export(small_models, tmp_path / "a", path)
    shutil.copy(moments_path(small_models.calibration("qwen2", steps=STEPS)), moments_path(path))
    message = r"calibration\.moments\.safetensors has SHA-256 .*; calibration\.json names "
    with pytest.raises(CalibrationError, match=message):
        export(small_models, tmp_path / "a", path)
    assert not (tmp_path / "a").exists()


def test_without_steps(small_models: SmallModels) -> None:
    calibration = small_models.calibration("llama", steps=0)
    bundle = small_models.bundle("llama", steps=0, precisions=("fp32", *INT8), calibration=calibration)
    exact = Embedder(bundle, precision="fp32").encode(["a storm", "my old garden"])
    for precision in INT8:
        assert row_cosine(Embedder(bundle, precision=precision).encode(["a storm", "my old garden"]), exact).min() > 0.9


def test_parity_sees_the_same_softmax_in_every_variant(small_models: SmallModels) -> None:
    bundle = int8_bundle(small_models, "llama")
    options = ParityOptions(bundle, precisions=("fp32", "int8"), reference=f"{bundle}:int8-weights")
    found = [candidate.steps[1].soft_tokens for candidate in measure_parity(options).report.candidates]
    exact, ours = (soft for soft in found if soft is not None)
    assert ours.entropy == pytest.approx(exact.entropy, rel=0.02)
