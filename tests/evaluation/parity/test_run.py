"""The parity gate: what it measures is right, it passes what is equal and fails what is not, and it never guesses."""

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from support.reference_loop import plain_states
from support.schema_documents import documented, schema_of
from support.small_models import SmallModels, add_stepwise_variants, rehash, scale_weights
from support.task_data import STS, beir, write
from support.tolerances import CONTROL_MIN_DIFFERENCE, PROBE_MAX_DIFFERENCE, SMALL_MODEL_MAX_DIFFERENCE

from gircse.evaluation import parity_command
from gircse.evaluation.parity.backends import (
    BundleBackend,
    TorchBackend,
    parse_bundle_reference,
    source_checkpoint,
    token_count,
)
from gircse.evaluation.parity.gates import at_least, at_most, limits_of
from gircse.evaluation.parity.graph_probe import GraphProbe
from gircse.evaluation.parity.report_schema import ParityReport
from gircse.evaluation.parity.run import ParityOptions, measure_parity
from gircse.evaluation.parity.step_trace import StepTrace, pooled
from gircse.evaluation.tasks.files import TaskOptions, read_tasks
from gircse.evaluation.tasks.prompts import read_prompts, tokenize_prompts
from gircse.reporting.progress import StageProgress
from gircse.runtime import BundleError, Embedder, MeasurementError
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout, Pooling
from gircse.runtime.numerics import l2_normalize
from gircse.runtime.precision import SPECS, Precision
from gircse.runtime.tokenization import open_tokenizer

LAYOUTS = ("unrolled", "stepwise")
MODEL = "llama"  # AutoTokenizer takes its tokenizer.json as it is, and no rules of the model type


@pytest.fixture
def bundle_copy(small_models: SmallModels, tmp_path: Path) -> Path:
    """A bundle to be damaged."""
    return Path(shutil.copytree(small_models.bundle(MODEL), tmp_path / "copy"))


@pytest.fixture(scope="module")
def token_ids(small_models: SmallModels) -> list[list[int]]:
    return tokenize_prompts(open_tokenizer(Bundle.open(small_models.bundle(MODEL))), read_prompts(None)[:24])


@pytest.fixture(scope="module")
def reference(small_models: SmallModels, token_ids: list[list[int]]) -> tuple[np.ndarray, StepTrace]:
    bundle = Bundle.open(small_models.bundle(MODEL))
    checkpoint = source_checkpoint(bundle.manifest)
    side = TorchBackend(bundle, checkpoint, device="cpu", dtype="fp32", threads=2)
    return side.embed_and_trace(token_ids, lambda _: None)


def test_reference_side_is_the_plain_loop(
    small_models: SmallModels, token_ids: list[list[int]], reference: tuple[np.ndarray, StepTrace]
) -> None:
    vectors, trace = reference
    model = small_models.load(MODEL)
    for row in (0, 7, 23):
        states = plain_states(model, token_ids[row], 5)
        np.testing.assert_allclose(trace.states[row], states, atol=PROBE_MAX_DIFFERENCE)
        probabilities = torch.softmax(model.lm_head(states[:-1]), dim=-1)
        entropy = torch.distributions.Categorical(probs=probabilities).entropy()
        np.testing.assert_allclose(trace.stats.entropy[row], entropy.detach(), atol=PROBE_MAX_DIFFERENCE)
        soft_tokens = (probabilities @ model.get_input_embeddings().weight).detach()
        np.testing.assert_allclose(trace.soft_tokens[row], soft_tokens, atol=PROBE_MAX_DIFFERENCE)
        # 520 rows, of which the tokenizer has 512 and something
        padded = probabilities[:, token_count(Bundle.open(small_models.bundle(MODEL))) :].sum(1).detach()
        assert padded.min() > 0.001
        np.testing.assert_allclose(trace.stats.padded_mass[row], padded, atol=PROBE_MAX_DIFFERENCE)
    np.testing.assert_allclose(vectors, l2_normalize(pooled(trace.states, Pooling.MEAN)), atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_probe_sees_what_the_runtime_computes(
    small_models: SmallModels,
    token_ids: list[list[int]],
    reference: tuple[np.ndarray, StepTrace],
    layout: str,
) -> None:
    side = BundleBackend(Bundle.open(small_models.bundle(MODEL, layout=layout)), "fp32", threads=2)
    vectors, trace = side.embed_and_trace(token_ids, lambda _: None)
    np.testing.assert_allclose(l2_normalize(pooled(trace.states, Pooling.MEAN)), vectors, atol=1e-6)
    np.testing.assert_allclose(vectors, reference[0], atol=SMALL_MODEL_MAX_DIFFERENCE)
    for name in ("states", "soft_tokens"):
        np.testing.assert_allclose(getattr(trace, name), getattr(reference[1], name), atol=PROBE_MAX_DIFFERENCE)
    for name in ("entropy", "top1_mass", "padded_mass", "norm"):
        ours, theirs = (getattr(stats, name) for stats in (trace.stats, reference[1].stats))
        np.testing.assert_allclose(ours, theirs, atol=PROBE_MAX_DIFFERENCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_teacher_forcing_feeds_the_given_soft_tokens(
    small_models: SmallModels, token_ids: list[list[int]], reference: tuple[np.ndarray, StepTrace], layout: str
) -> None:
    probe = GraphProbe(Bundle.open(small_models.bundle(MODEL, layout=layout)), "fp32", threads=2)
    given = np.roll(reference[1].soft_tokens, 1, axis=0)  # each text gets another one's
    states = np.empty_like(reference[1].states)
    for rows, steps in probe.refine(token_ids, forced=given):
        for step, values in enumerate(steps):
            states[rows, step] = values.state
    assert np.abs(states[:, 1:] - reference[1].states[:, 1:]).max() > CONTROL_MIN_DIFFERENCE
    model = small_models.load(MODEL)
    table = model.get_input_embeddings().weight
    for row in (3, 11):
        embeds = torch.cat([table[torch.tensor([token_ids[row]])], torch.from_numpy(given[row : row + 1])], dim=1)
        with torch.no_grad():
            wanted = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -6:]
        np.testing.assert_allclose(states[row], wanted, atol=PROBE_MAX_DIFFERENCE)


def test_probe_refuses_graphs_without_names(bundle_copy: Path) -> None:
    path = bundle_copy / "fp32" / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"step1/soft_token", b"step1/soft_tokem"))
    with pytest.raises(MeasurementError.__base__, match=r"no value step1/soft_token \| .* export the bundle again"):
        GraphProbe(Bundle.open(bundle_copy), "fp32", threads=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("against", ["torch", "other layout"])
def test_equal_sides_pass(small_models: SmallModels, layout: str, against: str) -> None:
    other = small_models.bundle(MODEL, layout=LAYOUTS[layout == "unrolled"])
    options = ParityOptions(
        small_models.bundle(MODEL, layout=layout),
        reference="torch" if against == "torch" else f"{other}:fp32",
        cross_steps=True,
    )
    result = measure_parity(options)
    (candidate,) = result.report.candidates
    assert result.report.passed
    assert [step.step for step in candidate.steps] == [0, 1, 2, 3, 4, 5]
    assert len(candidate.texts) == result.report.texts == 64
    assert candidate.batch_variance.texts == 32
    for step in candidate.steps:
        assert step.max_difference < SMALL_MODEL_MAX_DIFFERENCE
        assert abs(step.norm_ratio_min - 1) < 1e-4 > abs(step.norm_ratio_max - 1)
        assert min(step.cosine_min, step.state_cosine_min, step.forced_state_cosine_min) > 0.999999
    matrix = np.array(candidate.cross_steps.matrix)
    assert matrix.shape == (5, 5)
    assert matrix[-1, -1] == pytest.approx(candidate.steps[-1].rank_correlation, abs=1e-6)
    assert matrix[0, 0] < 0.999  # fewer steps are something else
    names = [gate.name for gate in candidate.gates]
    assert ("texts with other token ids" in names) == (against == "torch")


def test_damage_is_measured_and_told_apart(small_models: SmallModels, bundle_copy: Path) -> None:
    """Weights that are a little off: every gate fails, and forcing the soft tokens takes the drift away."""
    scale_weights(bundle_copy, 0.0, 1.0, 1.05)
    result = measure_parity(ParityOptions(bundle_copy))
    (candidate,) = result.report.candidates
    failed = {gate.name for gate in candidate.gates if not gate.passed}
    assert failed == {"cosine", "rank correlation", "neighbor overlap"}
    last = candidate.steps[-1]
    assert last.cosine_min < 0.999
    assert last.norm_ratio_max > 1.02
    assert 1 - last.forced_state_cosine_min < 0.7 * (1 - last.state_cosine_min)
    embedded = Embedder(bundle_copy).encode([prompt.text for prompt in result.prompts], all_steps=True)
    wanted = Embedder(small_models.bundle(MODEL)).encode([prompt.text for prompt in result.prompts], all_steps=True)
    by_hand = (embedded * wanted).sum(-1)
    for step in candidate.steps[1:]:
        assert step.cosine_min == pytest.approx(by_hand[:, step.step - 1].min(), abs=1e-5)
        assert candidate.texts[5].cosine[step.step] == pytest.approx(by_hand[5, step.step - 1], abs=1e-5)


@pytest.mark.parametrize(("start", "message"), [(-1, r"step 1: entropy of soft token s_1"), (0, r"step 0: ")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_names_the_step(small_models: SmallModels, tmp_path: Path, layout: str, start: int, message: str) -> None:
    """A vocabulary row that only the projection reads breaks step 1; the final norm breaks the prompt."""
    bundle = tmp_path / "bundle"
    shutil.copytree(small_models.bundle(MODEL, layout=layout), bundle)
    path = bundle / "fp32" / "weights.bin"
    content = path.read_bytes()
    model = small_models.load(MODEL)
    tensor = model.get_input_embeddings().weight[-1] if start else model.model.norm.weight
    needle = tensor.detach().numpy().tobytes()
    assert content.count(needle) == 1
    path.write_bytes(content.replace(needle, np.full(48, np.nan, np.float32).tobytes()))
    rehash(bundle)
    with pytest.raises(MeasurementError, match=message):
        BundleBackend(Bundle.open(bundle), "fp32", threads=1).embed_and_trace(
            [[1, 2, 3]], lambda _: None
        ) if start == 0 else BundleBackend(Bundle.open(bundle), "fp32", threads=1).trace_and_force(
            [[1, 2, 3]], np.zeros((1, 5, 48), np.float32), lambda _: None
        )
    assert parity_command.main([str(bundle)]) == 2


def test_task_scores_are_those_of_the_vectors(small_models: SmallModels, bundle_copy: Path, tmp_path: Path) -> None:
    scale_weights(bundle_copy, 0.0, 1.0, 1.05)
    tasks = TaskOptions(sts=write(tmp_path / "pairs.tsv", STS), retrieval=beir(tmp_path / "found"))
    reference = f"{small_models.bundle(MODEL)}:fp32"
    options = ParityOptions(
        bundle_copy, reference=reference, tasks=tasks, cross_steps=True, limits={"max_task_drop": -1.0}
    )
    (candidate,) = measure_parity(options).report.candidates
    sts, retrieval = candidate.tasks
    assert (sts.metric, retrieval.metric) == ("Spearman", "nDCG@10")
    gates = {gate.name: gate for gate in candidate.gates}
    for task in (sts, retrieval):
        gate = gates[f"drop of {task.metric}, {task.task}"]
        assert gate.value == task.reference[-1] - task.candidate[-1]
        assert not gate.passed
        assert task.difference_low <= task.candidate[-1] - task.reference[-1] <= task.difference_high
    assert candidate.cross_steps.metric == "nDCG@10"
    assert candidate.cross_steps.matrix[4][4] == retrieval.candidate[5]
    # by hand, from the runtime
    for task, found in zip(read_tasks(tasks), candidate.tasks, strict=True):
        for path, scores in ((bundle_copy, found.candidate), (small_models.bundle(MODEL), found.reference)):
            embedder = Embedder(path)
            vectors = np.concatenate(
                [embedder.encode([prompt.text], instruction=prompt.instruction, steps=2) for prompt in task.prompts]
            )
            assert scores[2] == pytest.approx(task.score(vectors), abs=1e-3)


def test_tokenizer_that_differs_from_the_checkpoint_fails(bundle_copy: Path) -> None:
    path = bundle_copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    rehash(bundle_copy)
    (candidate,) = measure_parity(ParityOptions(bundle_copy)).report.candidates
    gate = candidate.gates[-1]
    assert gate.name == "texts with other token ids"
    assert gate.value > 30
    assert not gate.passed


def test_bundle_without_refinement(small_models: SmallModels) -> None:
    (candidate,) = measure_parity(
        ParityOptions(small_models.bundle(MODEL, steps=0), cross_steps=True)
    ).report.candidates
    assert candidate.passed
    assert [step.step for step in candidate.steps] == [0]


def test_command_writes_the_report(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "new" / "report"
    bundle = small_models.bundle(MODEL)
    pairs = str(write(tmp_path / "pairs.tsv", STS))
    assert parity_command.main([str(bundle), "--report", str(report), "--sts", pairs, "--cross-steps"]) == 0
    out = capsys.readouterr().out
    assert "pass  cosine" in out
    assert f"{bundle.name}:fp32 against PyTorch fp32 on cpu, 64 texts" in out
    names = {"parity.json", "parity.md", "parity.xml", "error-by-step.png", "cosine-histogram.png"}
    assert {path.name for path in report.iterdir()} == names | {"similarity-scatter.png"}
    assert out.splitlines()[-1].startswith(str(report))
    found = msgspec.json.decode((report / "parity.json").read_bytes(), type=ParityReport)
    assert found.passed
    assert b"NaN" not in (report / "parity.json").read_bytes()
    suite = ET.parse(report / "parity.xml").getroot()[0]
    assert len(suite) == int(suite.attrib["tests"]) == len(found.candidates[0].gates) == 6
    assert suite.attrib["failures"] == "0"
    text = (report / "parity.md").read_text(encoding="utf-8")
    assert "# Parity of" in text
    last = found.candidates[0].steps[-1]
    assert f"| 5 | {1 - last.cosine_min:.1e} | {1 - last.cosine_mean:.1e} |" in text
    assert "![error-by-step](error-by-step.png)" in text


def test_command_fails_on_a_gate(small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = small_models.bundle(MODEL, layout="stepwise")
    arguments = [str(bundle), "--reference", str(small_models.bundle(MODEL)), "--report", str(tmp_path)]
    assert parity_command.main([*arguments, "--min-cosine", "1.5"]) == 1
    assert "FAIL  cosine" in capsys.readouterr().out
    suite = ET.parse(tmp_path / "parity.xml").getroot()[0]
    assert suite.attrib["failures"] == "1"
    assert suite.find("testcase/failure") is not None
    assert parity_command.main([*arguments, "--min-cosine", "0.5"]) == 0
    assert ET.parse(tmp_path / "parity.xml").getroot()[0].attrib["failures"] == "0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "nowhere"], "nowhere: no gircse.json"),
        (["--reference", "{k3}"], "steps 3 | 5"),
        (["--reference", "{qwen2}"], "architecture qwen2 | llama"),
        (["--reference", "{bundle}"], "is its only precision"),
        (["--reference", "{bundle}:int4"], "precision 'int4'"),
        (["--precision", "fp8"], "precision 'fp8'"),
        (["--texts", "nowhere.txt"], "nowhere.txt"),
        (["--sts", "nowhere.tsv"], "nowhere.tsv"),
        (["--retrieval", "nowhere"], "--retrieval nowhere: no corpus.jsonl"),
        (["--model", "{other_model}"], "config.json with SHA-256"),
        (["--model", "nowhere"], "--model nowhere is neither a directory nor a Hugging Face id"),
        (["--device", "warp"], "--device warp"),
        (["--threads", "0"], "threads: 0"),
        (["--provider", "cuda"], "provider cuda: this onnxruntime has"),
        (["--report", "/proc/nowhere"], "--report /proc/nowhere"),
    ],
)
def test_command_cannot_measure(
    small_models: SmallModels, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    bundle = small_models.bundle(MODEL)
    places = {
        "bundle": bundle,
        "k3": small_models.bundle(MODEL, steps=3),
        "qwen2": small_models.bundle("qwen2"),
        "other_model": small_models.checkpoint("qwen2"),
    }
    assert parity_command.main([str(bundle), *(argument.format(**places) for argument in arguments)]) == 2
    err = capsys.readouterr().err
    assert "gircse-parity: error: " in err
    assert message in err


def test_low_precisions_in_both_layouts(small_models: SmallModels, tmp_path: Path) -> None:
    """Emulated variants against FP32 of the same bundle, in the graph that is not the bundle's default too."""
    bundle = small_models.bundle(MODEL, precisions=("fp32", "fp16", "bf16"))
    for layout in LAYOUTS:
        result = measure_parity(ParityOptions(bundle, reference=f"{bundle}:fp32", layout=Layout(layout)))
        assert [candidate.precision for candidate in result.report.candidates] == ["fp16", "bf16"]
        fp16, bf16 = (1 - candidate.steps[1].cosine_mean for candidate in result.report.candidates)
        assert 0 < fp16 < bf16 / 10  # three bits of mantissa apart


def test_a_variant_without_the_unrolled_graph_is_judged_in_the_stepwise_one(bundle_copy: Path) -> None:
    add_stepwise_variants(bundle_copy, "int8")
    candidates = measure_parity(ParityOptions(bundle_copy, reference=f"{bundle_copy}:fp32")).report.candidates
    assert [(candidate.precision, candidate.passed) for candidate in candidates] == [("int8", True)]
    unrolled = ParityOptions(bundle_copy, reference=f"{bundle_copy}:int8", layout=Layout.UNROLLED)
    assert [candidate.precision for candidate in measure_parity(unrolled).report.candidates] == ["fp32"]
    with pytest.raises(BundleError, match=r"int8: layout unrolled \| it has stepwise \| "):
        measure_parity(replace(unrolled, precisions=("int8",)))


def test_too_little_memory_is_said_beforehand(
    small_models: SmallModels, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    assert parity_command.main([str(small_models.bundle(MODEL))]) == 2
    assert "memory: 1.0 GiB available | 1.3 GiB for the PyTorch model" in capsys.readouterr().err


def test_reference_bundle_needs_no_torch(small_models: SmallModels) -> None:
    code = f"""
import sys
from importlib.abc import MetaPathFinder
class Refuse(MetaPathFinder):  # None in sys.modules would do, but scipy looks there for torch
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft", "onnx_ir", "onnxscript"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from gircse.evaluation.parity_command import main
sys.exit(main([{str(small_models.bundle(MODEL))!r}, "--reference",
               {str(small_models.bundle(MODEL, layout="stepwise"))!r}]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_missing_packages_are_named(
    small_models: SmallModels, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gircse.evaluation.parity.run", None)
    assert parity_command.main([str(small_models.bundle(MODEL))]) == 2
    assert "pip install 'gircse-deploy[cpu,evaluation]'" in capsys.readouterr().err


def test_gates() -> None:
    assert at_least("x", 0.5, 0.5).passed
    assert not at_least("x", float("nan"), 0.5).passed
    assert not at_most("x", float("nan"), 0.5).passed
    assert limits_of("fp16", {}) == SPECS[Precision.FP16].limits
    with pytest.raises(BundleError, match="unheard-of"):
        limits_of("unheard-of", {})
    changed = limits_of("int8", {"min_overlap": 0.5, "max_task_drop": 0.0})
    assert (changed.min_overlap, changed.max_task_drop) == (0.5, 0.0)
    assert changed.min_cosine == SPECS[Precision.INT8].limits.min_cosine


def test_bundle_references(tmp_path: Path) -> None:
    assert parse_bundle_reference("a/b:fp16") == (Path("a/b"), "fp16")
    assert parse_bundle_reference("a/b") == (Path("a/b"), None)
    (tmp_path / "x:y").mkdir()
    assert parse_bundle_reference(f"{tmp_path}/x:y") == (tmp_path / "x:y", None)


def test_schema_document_is_up_to_date() -> None:
    assert documented("parity.schema.json") == schema_of(ParityReport)


def test_progress_is_silent_on_request(small_models: SmallModels, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever calls from Python may bring a progress display of their own."""
    options = ParityOptions(small_models.bundle(MODEL, steps=0), reference="torch")
    measure_parity(options, progress=StageProgress())
    assert "compare fp32" in capsys.readouterr().err
