"""The ``fp8`` variant of the small models: what its graph holds, and the vectors of its emulation on a CPU."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from support.int8_bundles import MODELS, export, run, written
from support.small_models import SmallModels
from support.tolerances import (
    CONTROL_MIN_DIFFERENCE,
    FP8_EMULATED_MIN_COSINE,
    FP8_FAKE_MIN_COSINE,
    FP8_MIN_COSINE,
    FP8_PROMPT_MIN_COSINE,
)
from support.vectors import PROMPTS, STEPS, padded

from gircse.calibration.calibration_file import Calibration
from gircse.calibration.int8.gptq import round_smoothed
from gircse.calibration.int8.scheme import decoder_inputs
from gircse.calibration.moments_file import MomentsFile
from gircse.checkpoint.reference import refine
from gircse.evaluation.parity.backends import BundleBackend
from gircse.export.fp8.e4m3 import E4M3_GRID, E4M3_LO_LIMB, MIN_SCALE, e4m3_step
from gircse.runtime import Embedder, tensor_names
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import ExportError, OptionError
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import l2_normalize, row_cosine


def fp8_bundle(small_models: SmallModels, name: str) -> Path:
    calibration = small_models.calibration(name, steps=STEPS)
    return small_models.bundle(name, steps=STEPS, precisions=("fp32", "fp8"), calibration=calibration)


def graph_of(bundle: Path) -> ir.Graph:
    return ir.load(Bundle.open(bundle).graph("fp8", Layout.STEPWISE)).graph


def fake_prompt_state(small_models: SmallModels, name: str) -> np.ndarray:
    """Return h_0 of the PyTorch model with weights and inputs of its products rounded to E4M3."""
    model, path = small_models.load(name), small_models.calibration(name, steps=STEPS)
    calibration = Calibration.read(path)
    moments = MomentsFile.open(path, calibration.moments_sha256)
    for entry in decoder_inputs(2)[:-1]:
        found = calibration.inputs[entry.name]
        channels, step = list(found.outlier_channels), e4m3_step(found.threshold, entry.name)
        smoothing = torch.tensor(found.smoothing) if found.smoothing else torch.ones(1)

        def hook(
            _: torch.nn.Module,
            inputs: tuple[torch.Tensor],
            smoothing: torch.Tensor = smoothing,
            channels: list[int] = channels,
            step: float = step,
        ) -> tuple[torch.Tensor]:
            smoothed = inputs[0] / smoothing
            hi = E4M3_GRID.round(smoothed / step)
            lo = E4M3_GRID.round((smoothed - hi * step) * E4M3_LO_LIMB / step)
            rounded = (hi + lo / E4M3_LO_LIMB) * step
            rounded[..., channels] = smoothed[..., channels]
            return (rounded,)

        for projection in entry.projections:
            module = model.get_submodule(projection)
            scales = torch.tensor(found.smoothing) if found.smoothing else None
            part = round_smoothed(
                module.weight.data, scales, found.outlier_channels, moments.read(entry.name), grid=E4M3_GRID
            )
            module.weight.data = part.integers.float() * part.scales[:, None]
            module.weight.data[:, channels] = part.columns
            module.register_forward_pre_hook(hook)
    ids, mask = map(torch.from_numpy, padded(PROMPTS, left=True, extra=0))
    return l2_normalize(next(iter(refine(model, ids, mask, steps=0, temperature=1.0))).hidden.detach().numpy())


@pytest.mark.parametrize("name", MODELS)
def test_vectors(small_models: SmallModels, name: str) -> None:
    bundle = fp8_bundle(small_models, name)
    ours = run(bundle, "fp8")
    cosines = row_cosine(ours, run(bundle, "fp32"))
    assert cosines[:, 0].min() > FP8_PROMPT_MIN_COSINE
    assert cosines.min() > FP8_MIN_COSINE
    fake = row_cosine(ours[:, 0], fake_prompt_state(small_models, name)).min()
    assert fake > FP8_FAKE_MIN_COSINE
    assert cosines[:, 0].min() < fake, "nothing was rounded"


def test_emulated_as_a_gpu_computes_it(small_models: SmallModels) -> None:
    """By which ``gircse-parity`` judges the variant: FP16 results are rounded too."""
    bundle = fp8_bundle(small_models, "llama")
    backend = BundleBackend(Bundle.open(bundle), "fp8")
    assert backend.name.endswith("fp8, emulated")
    ours = backend.embed(PROMPTS, lambda _: None)
    assert row_cosine(ours[:, 0], run(bundle, "fp8")[:, 0]).min() > FP8_EMULATED_MIN_COSINE


def test_graph(small_models: SmallModels) -> None:
    """Every product of the decoder multiplies E4M3 numbers; weights have a scale per column that FP16 holds."""
    bundle = fp8_bundle(small_models, "llama")
    graph = graph_of(bundle)
    products = [node for node in graph if node.op_type == "MatMul" and not node.inputs[0].is_initializer()]
    outliers = [node for node in products if node.inputs[1].is_initializer()]
    products = [node for node in products if node not in outliers]
    assert len(products) == 2 * 5
    assert all(str(node.inputs[1].name).endswith(".float") for node in outliers)
    for node in products:
        left, right = (value.producer() for value in node.inputs)
        assert (left.op_type, right.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert {value.dtype for value in (*node.inputs, *node.outputs)} == {ir.DataType.FLOAT16}
        weight, scales = (value.const_value.numpy() for value in right.inputs)
        assert (weight.dtype.name, scales.dtype, right.attributes["axis"].as_int()) == ("float8_e4m3fn", np.float16, 1)
        assert scales.shape == weight.shape[1:]
        assert scales.min() >= MIN_SCALE
        quantize = left.inputs[0].producer()
        assert (quantize.op_type, quantize.inputs[0].producer().op_type) == ("QuantizeLinear", "Concat")
        steps = [float(end.inputs[1].const_value.numpy()) for end in (quantize, left)]
        assert steps[0] == steps[1] >= MIN_SCALE
    assert all("saturate" not in node.attributes for node in graph)  # on, where nothing is said
    caches = [value for value in (*graph.inputs, *graph.outputs) if tensor_names.is_cache(str(value.name))]
    assert {value.dtype for value in caches} == {ir.DataType.FLOAT16}


def test_one_graph_of_standard_operators_serves_both_runtimes(small_models: SmallModels) -> None:
    bundle = Bundle.open(fp8_bundle(small_models, "qwen2"))
    path = bundle.graph("fp8", Layout.STEPWISE)
    assert bundle.engine_graph("fp8", Layout.STEPWISE) == path
    onnx.checker.check_model(str(path))
    assert {node.domain for node in graph_of(bundle.directory)} == {""}
    assert bundle.manifest.variants["fp8"].files == {"fp8/stepwise.onnx", "fp8/weights.bin"}
    assert {"fp8/calibration.json", "fp8/magnitudes.json"} <= bundle.manifest.files.keys()


def test_weights_take_a_byte(small_models: SmallModels) -> None:
    """Each is stored once, E4M3 in the decoder and FP16 in the vocabulary."""
    bundle = fp8_bundle(small_models, "mistral-linear")
    used = Counter(str(value.name) for node in graph_of(bundle) for value in node.inputs if value is not None)
    types = {name: value.dtype for name, value in graph_of(bundle).initializers.items() if len(value.shape) == 2}
    low = {name for name, dtype in types.items() if dtype is ir.DataType.FLOAT8E4M3FN}
    assert len(low) == 2 * 5
    assert all(used[name] == 1 for name in low)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= types.keys() - low


def edited(path: Path, folder: Path, name: str, **fields: Any) -> Path:
    content = json.loads(path.read_text())
    content["inputs"][name].update(fields)
    return written(content, path, folder)


def test_a_wrong_scale_is_noticed(small_models: SmallModels, tmp_path: Path) -> None:
    """A threshold that is too small cuts, and NaN is not what becomes of it."""
    path, name = small_models.calibration("llama", steps=STEPS), "model.layers.1.mlp_input"
    thresholds = [value / 20 for value in Calibration.read(path).inputs[name].thresholds]
    bundle = export(
        small_models, tmp_path / "wrong", edited(path, tmp_path, name, thresholds=thresholds), precisions=("fp8",)
    )
    ours = run(bundle, "fp8")
    assert np.isfinite(ours).all()
    assert np.abs(ours - run(fp8_bundle(small_models, "llama"), "fp8")).max() > CONTROL_MIN_DIFFERENCE


def test_an_input_that_fp16_cannot_hold(small_models: SmallModels, tmp_path: Path) -> None:
    path, name = small_models.calibration("llama", steps=STEPS), "model.layers.0.mlp_output"
    large = edited(path, tmp_path, name, thresholds=[1e5] * (STEPS + 1))
    with pytest.raises(ExportError, match=rf"{name} has a magnitude of 100016; .* --keep-float32 NAME"):
        export(small_models, tmp_path / "bundle", large, precisions=("fp8",))
    bundle = export(small_models, tmp_path / "bundle", large, precisions=("fp8",), keep_float32=("0.mlp.down_proj",))
    graph = graph_of(bundle)
    (weight,) = [value for name, value in graph.initializers.items() if "0.mlp.down_proj" in name]
    assert weight.dtype is ir.DataType.FLOAT
    assert "0.mlp.down_proj" in Bundle.open(bundle).manifest.variants["fp8"].float32
    assert np.isfinite(run(bundle, "fp8")).all()


def test_needs_a_calibration(small_models: SmallModels, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--precision fp8 needs a --calibration"):
        export(small_models, tmp_path / "bundle", None, precisions=("fp8",))


def test_without_steps(small_models: SmallModels) -> None:
    calibration = small_models.calibration("llama", steps=0)
    bundle = small_models.bundle("llama", steps=0, precisions=("fp32", "fp8"), calibration=calibration)
    exact, ours = (Embedder(bundle, precision=name).encode(["a storm", "my old garden"]) for name in ("fp32", "fp8"))
    assert row_cosine(ours, exact).min() > FP8_PROMPT_MIN_COSINE
