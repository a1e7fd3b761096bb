"""A fault in one layer is found where it was put, and nothing is found in a sound bundle."""

import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from support.small_models import DEEP, SmallModels, rehash
from support.tolerances import CONTROL_MIN_DIFFERENCE, LAYER_MAX_DIFFERENCE, PROBE_MAX_DIFFERENCE

from gircse.checkpoint.reference_choice import ReferenceOptions
from gircse.evaluation import parity_command
from gircse.evaluation.parity.backends import BundleBackend, TorchBackend
from gircse.evaluation.parity.batches import side_batches
from gircse.evaluation.parity.layer_errors import compare_layers, find_jumps, largest_growth
from gircse.evaluation.parity.layer_trace import LayerTrace
from gircse.evaluation.parity.references import source_checkpoint
from gircse.evaluation.parity.report_schema import LayerReport, ParityReport
from gircse.runtime import BundleError, MeasurementError
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout

STEPS = 2
LAYERS = 4
TEXT = [5, 300, 44, 44, 260, 9, 101]
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-weights", "int4-weights", "fp8")
FAULTY = 2


@pytest.fixture(scope="module")
def sound(small_models: SmallModels) -> Path:
    """A bundle of a model of four layers, in every precision and layout."""
    calibration = small_models.calibration(DEEP, steps=STEPS)
    return small_models.bundle(DEEP, steps=STEPS, precisions=PRECISIONS, calibration=calibration)


@pytest.fixture(scope="module")
def reference(small_models: SmallModels, sound: Path) -> LayerTrace:
    bundle = Bundle.open(sound)
    checkpoint = source_checkpoint(bundle.manifest, model=str(small_models.checkpoint(DEEP)))
    return TorchBackend(bundle, checkpoint, ReferenceOptions(), threads=2).trace_layers(TEXT)


def traced(bundle: Path, precision: str, layout: Layout | None, forced: LayerTrace | None = None) -> LayerTrace:
    opened = Bundle.open(bundle)
    (batch,) = side_batches([TEXT], opened.manifest)
    return BundleBackend(opened, precision, layout=layout, threads=2).open_layer_probe().trace(batch, forced=forced)


def located(bundle: Path, precision: str, reference: LayerTrace, layout: Layout | None = None) -> LayerReport:
    alone, running = traced(bundle, precision, layout, reference), traced(bundle, precision, layout)
    return compare_layers(precision, 0, reference=reference, running=running, alone=alone)


def damaged(bundle: Path, folder: Path, precision: str, tensor: str, factor: float) -> Path:
    """Copy a bundle and multiply one tensor of a variant, as if it had been exported so."""
    copy = Path(shutil.copytree(bundle, folder / "copy"))
    graph = copy / precision / "stepwise.onnx"
    (found,) = [one for one in onnx.load(graph, load_external_data=False).graph.initializer if one.name == tensor]
    place = {entry.key: entry.value for entry in found.external_data}
    kind = onnx.helper.tensor_dtype_to_np_dtype(found.data_type)
    weights = np.memmap(copy / precision / place["location"], np.uint8, "r+")
    start = int(place["offset"])
    values = weights[start : start + int(place["length"])].view(kind)
    values[:] = (values * factor).astype(kind)
    weights.flush()
    rehash(copy)
    return copy


def test_reference_sees_the_layers_of_plain_torch(small_models: SmallModels, reference: LayerTrace) -> None:
    """The K + 1 passes with a cache against one pass over the prompt and the soft tokens, without one."""
    model = small_models.load(DEEP).requires_grad_(False)
    soft_tokens = torch.from_numpy(np.concatenate([stream[0] for stream in reference.streams[1:]]))
    embeds = torch.cat([model.get_input_embeddings().weight[TEXT], soft_tokens])[None]
    with torch.no_grad():
        output = model.model(inputs_embeds=embeds.detach(), use_cache=False, output_hidden_states=True)
    ours = np.concatenate(reference.streams, axis=1)
    assert ours.shape == (LAYERS + 1, len(TEXT) + STEPS, 48)
    for depth in range(LAYERS):  # what it returns of the last one is normalized
        np.testing.assert_allclose(ours[depth], output.hidden_states[depth][0], atol=PROBE_MAX_DIFFERENCE)
    last = torch.from_numpy(ours[-1, len(TEXT) - 1 :])
    for found in (reference.states, model.model.norm(last).detach()):
        np.testing.assert_allclose(found, output.last_hidden_state[0, len(TEXT) - 1 :], atol=PROBE_MAX_DIFFERENCE)


@pytest.mark.parametrize("layout", Layout)
def test_probe_sees_the_layers_of_the_reference(sound: Path, reference: LayerTrace, layout: Layout) -> None:
    found = traced(sound, "fp32", layout)
    np.testing.assert_allclose(found.states, reference.states, atol=PROBE_MAX_DIFFERENCE)
    for ours, theirs in zip(found.streams, reference.streams, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=PROBE_MAX_DIFFERENCE)


@pytest.mark.parametrize("layout", Layout)
def test_what_a_layer_is_fed_reaches_that_layer_alone(sound: Path, reference: LayerTrace, layout: Layout) -> None:
    """Through its own keys and values it reaches later steps, and nothing else."""
    changed = [stream.copy() for stream in reference.streams]
    changed[1][2] += np.linspace(-1, 1, 48, dtype=np.float32)  # a norm would take a factor away
    before, after = (
        traced(sound, "fp32", layout, given) for given in (reference, LayerTrace(changed, reference.states))
    )
    differs = np.array(
        [
            [np.abs(ours - theirs).max() > LAYER_MAX_DIFFERENCE for ours, theirs in zip(*streams, strict=True)]
            for streams in zip(after.streams, before.streams, strict=True)
        ]
    )
    assert np.argwhere(differs).tolist() == [[1, 3], [2, 3]]
    assert np.abs(after.streams[1][3] - before.streams[1][3]).max() > CONTROL_MIN_DIFFERENCE


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sound_bundle_has_no_jump(sound: Path, reference: LayerTrace, precision: str) -> None:
    report = located(sound, precision, reference)
    assert report.jumps == ()
    assert np.array(report.alone).shape == np.array(report.running).shape == (STEPS + 1, LAYERS + 2)
    if precision != "fp32":  # not compared with itself
        assert np.array(report.alone)[:, 1:-1].min() > LAYER_MAX_DIFFERENCE


@pytest.mark.parametrize(
    ("precision", "tensor", "factor"),
    [
        ("fp32", f"model.layers.{FAULTY}.mlp.down_proj.weight.T", 1.01),
        ("fp32", f"model.layers.{FAULTY}.post_attention_layernorm.weight", 1.05),
        ("fp16", f"model.layers.{FAULTY}.self_attn.v_proj.weight.T", 1.25),
        ("bf16", f"model.layers.{FAULTY}.self_attn.o_proj.weight.T", 1.5),
        ("int8", f"model.layers.{FAULTY}.mlp_output.scale", 2.0),
        ("int8-weights", f"model.layers.{FAULTY}.mlp.up_proj.scale", 1.5),
        ("int4-weights", f"model.layers.{FAULTY}.mlp.up_proj.scale", 8.0),
        ("fp8", f"model.layers.{FAULTY}.mlp_output.scale", 2.0),
    ],
)
def test_a_wrong_tensor_of_one_layer_is_located(
    sound: Path, tmp_path: Path, reference: LayerTrace, precision: str, tensor: str, factor: float
) -> None:
    report = located(damaged(sound, tmp_path, precision, tensor, factor), precision, reference)
    assert [(jump.step, jump.part) for jump in report.jumps] == [(step, f"layer {FAULTY}") for step in range(STEPS + 1)]


@pytest.mark.parametrize(
    ("tensor", "wanted"),
    [
        ("model.norm.weight", [(0, "final norm"), (1, "final norm"), (2, "final norm")]),
        # the tied table: rows of the prompt, and soft tokens made of logits and rows
        ("model.embed_tokens.weight", [(0, "embeddings"), (1, "soft token"), (2, "soft token")]),
    ],
)
def test_what_is_no_layer_is_located_too(
    sound: Path, tmp_path: Path, reference: LayerTrace, tensor: str, wanted: list[tuple[int, str]]
) -> None:
    report = located(damaged(sound, tmp_path, "fp32", tensor, 1.1), "fp32", reference)
    found = [(jump.step, jump.part) for jump in report.jumps]
    # A wrong norm makes wrong states, and of these wrong soft tokens.
    assert [one for one in found if tensor != "model.norm.weight" or one[1] != "soft token"] == wanted


def test_the_command_names_the_layer_and_the_first_step(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = damaged(sound, tmp_path, "int8", f"model.layers.{FAULTY}.mlp_output.scale", 2.0)
    report = tmp_path / "report"
    arguments = ["--reference", f"{sound}:fp32", "--precision", "int8", "--locate", "--report", str(report)]
    assert parity_command.main([str(bundle), *arguments]) == 1
    assert re.search(rf"layer {FAULTY} +0 +3 ", capsys.readouterr().out)
    assert "layers-int8.png" in {path.name for path in report.iterdir()}
    (candidate,) = msgspec.json.decode((report / "parity.json").read_bytes(), type=ParityReport).candidates
    assert {jump.part for jump in candidate.layers.jumps} == {f"layer {FAULTY}"}
    assert candidate.layers.text == min(range(64), key=lambda row: min(candidate.texts[row].cosine))
    text = (report / "parity.md").read_text(encoding="utf-8")
    assert re.search(rf"\| layer {FAULTY} \| 0 \| 3 \|", text)
    assert "![layers-int8](layers-int8.png)" in text


def test_graphs_without_names_of_layers_are_refused(sound: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sound, tmp_path / "copy"))
    path = copy / "fp32" / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"step1/layer.3", b"step1/lawyer3"))
    with pytest.raises(BundleError, match=r"has no value step1/layer\.3; .* Export the bundle again"):
        traced(copy, "fp32", Layout.UNROLLED)


@pytest.fixture
def traces() -> Callable[[], LayerTrace]:
    rng = np.random.default_rng(3)
    streams = [rng.normal(size=(4, positions, 8)).astype(np.float32) for positions in (5, 1)]
    states = rng.normal(size=(2, 8)).astype(np.float32)
    return lambda: LayerTrace([stream.copy() for stream in streams], states.copy())


def test_errors_are_relative_to_what_a_layer_adds_and_to_the_stream(traces: Callable[[], LayerTrace]) -> None:
    reference, alone, running = traces(), traces(), traces()
    alone.streams[0][2] += 0.25 * (reference.streams[0][2] - reference.streams[0][1])
    running.streams[1][3] *= 1.5
    running.states[1] *= 0.5
    report = compare_layers("x", 0, reference=reference, running=running, alone=alone)
    np.testing.assert_allclose(report.alone, [[0, 0, 0.25, 0, 0], [0, 0, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(report.running, [[0, 0, 0, 0, 0], [0, 0, 0, 0.5, 0.5]], atol=1e-6)
    assert [(jump.step, jump.part) for jump in report.jumps] == [(0, "layer 1")]
    assert largest_growth(report.running) == (1, 3)


def test_the_comparison_takes_no_copies_of_the_streams() -> None:
    """Of a 7B and a long text, one is hundreds of megabytes."""
    rng = np.random.default_rng(0)
    one, other = (
        LayerTrace([rng.standard_normal((41, 100, 64), dtype=np.float32)], np.ones((1, 64), np.float32))
        for _ in range(2)
    )
    tracemalloc.start()
    compare_layers("x", 0, reference=one, running=other, alone=other)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < one.streams[0].nbytes / 4


def test_a_layer_that_overflows_is_named(traces: Callable[[], LayerTrace]) -> None:
    broken = traces()
    broken.streams[1][2, 0, 4] = np.inf
    with pytest.raises(MeasurementError, match=r"demo:fp16, step 1: layer 1 has NaN or infinity in text 7"):
        compare_layers("demo:fp16", 7, reference=traces(), running=traces(), alone=broken)


def test_a_jump_is_ten_times_the_median_and_no_rounding_of_fp32() -> None:
    errors = np.full((2, 7), 1e-3)
    errors[0, 3], errors[1, 3], errors[1, 0] = 0.011, 0.009, 0.009
    assert [(jump.step, jump.part) for jump in find_jumps(errors)] == [(0, "layer 2")]
    assert find_jumps(errors)[0].times == pytest.approx(11)
    assert find_jumps(errors * 1e-4) == []
