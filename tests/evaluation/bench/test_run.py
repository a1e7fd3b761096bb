"""The benchmark: sides in turn, honest about what each has run, and about what died."""

import os
import shutil
import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support.small_models import SmallModels, add_stepwise_variants
from support.task_data import STS, write
from support.tolerances import SMALL_MODEL_MAX_DIFFERENCE

from gircse.evaluation import bench_command
from gircse.evaluation.bench.report_schema import BenchReport
from gircse.evaluation.bench.roofline import memory_bandwidth, weight_bytes_read
from gircse.evaluation.bench.worker import BackendSpec, Kind, Worker
from gircse.runtime import Embedder, MeasurementError
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout

SMALL = ["--batch", "1,3", "--tokens", "4,9", "--repeats", "3", "--threads", "1"]


def spec(bundle: Path, kind: Kind, precision: str = "fp32") -> BackendSpec:
    return BackendSpec(kind, kind, bundle, precision, threads=1, batch=3, tokens=9, steps=5)


def test_report(small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundles = [small_models.bundle("llama", layout=layout) for layout in ("stepwise", "unrolled")]
    pairs = str(write(tmp_path / "pairs.tsv", STS))
    arguments = [*map(str, bundles), *SMALL, "--steps", "1,5", "--against", "torch", "--sts", pairs]
    assert bench_command.main([*arguments, "--report", str(tmp_path / "report")]) == 0
    out = capsys.readouterr().out
    assert "Median time of a run" in out
    stems = {"latency-by-step", "throughput-by-batch", "quality-by-latency-pairs"}
    files = {f"{stem}.{end}" for stem in stems for end in ("png", "svg")} | {"bench.json", "bench.md"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == files
    report = msgspec.json.decode((tmp_path / "report" / "bench.json").read_bytes(), type=BenchReport)
    stepwise, unrolled, torch = (cost.side for cost in report.sides)
    measured = {(entry.side, entry.batch, entry.tokens, entry.steps) for entry in report.latencies}
    assert {key for key in measured if key[0] == unrolled} == {
        (unrolled, batch, tokens, 5) for batch in (1, 3) for tokens in (4, 9)
    }  # it runs K steps whatever is asked, so only K is measured
    for side in (stepwise, torch):
        assert {key[1:] for key in measured if key[0] == side} == {
            (batch, tokens, steps) for batch in (1, 3) for tokens in (4, 9) for steps in (1, 5)
        }
    for entry in report.latencies:
        assert 0 < entry.seconds.low <= entry.seconds.median <= entry.seconds.p95 <= entry.seconds.high
        assert entry.seconds.repeats == 3
        assert entry.texts_per_s == pytest.approx(entry.batch / entry.seconds.median)
        assert (entry.roofline_s is None) == (entry.side == torch)
    for cost in report.sides:
        assert cost.min_cosine > 0.99999  # every side has computed the same
        assert cost.load_s.repeats == 3
        assert cost.peak_bytes > cost.model_bytes > 0
    for quality in report.quality:
        assert len(quality.scores) == 6
    assert report.quality[0].scores == pytest.approx(report.quality[1].scores, abs=1e-3)


def test_a_variant_without_the_unrolled_graph_runs_stepwise(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(small_models.bundle("llama"), tmp_path / "bundle")
    add_stepwise_variants(bundle, "int8")
    flags = [str(bundle), "--batch", "1", "--tokens", "4", "--repeats", "3", "--threads", "1"]
    assert bench_command.main([*flags, "--layout", "unrolled", "--precision", "fp32", "int8"]) == 2
    assert "int8: layout unrolled | it has stepwise | " in capsys.readouterr().err
    for layout, sides in (
        ([], {("bundle:fp32", 5), ("bundle:int8", 1), ("bundle:int8", 5)}),
        (["--layout", "unrolled"], {("bundle:fp32", 5)}),
    ):
        assert bench_command.main([*flags, *layout, "--steps", "1,5", "--report", str(tmp_path / "report")]) == 0
        report = msgspec.json.decode((tmp_path / "report" / "bench.json").read_bytes(), type=BenchReport)
        assert {(entry.side, entry.steps) for entry in report.latencies} == sides


def test_worker_runs_what_it_is_given(small_models: SmallModels) -> None:
    bundle = small_models.bundle("llama", layout="stepwise")
    ids = np.random.default_rng(0).integers(0, 500, (3, 9))
    embedder = Embedder(bundle)
    ((rows, outputs),) = embedder.run_batches(ids.tolist(), steps=3)
    wanted = outputs.step_embeddings[np.argsort(rows), -1]
    for kind in (Kind.BUNDLE, Kind.TORCH):
        with Worker(spec(bundle, kind)) as worker:
            seconds, vectors = worker.run(ids, 3)
            assert seconds > 0
            assert worker.load_s > 0
            np.testing.assert_allclose(vectors, wanted, atol=SMALL_MODEL_MAX_DIFFERENCE)
            _, prompt = worker.run(ids, 0)
            assert np.abs(prompt - wanted).max() > 0.01
            assert worker.peak_bytes() > 50 << 20


def test_worker_errors_reach_the_parent(small_models: SmallModels) -> None:
    bundle = small_models.bundle("llama", layout="stepwise")
    with Worker(spec(bundle, Kind.BUNDLE)) as worker:
        with pytest.raises(ValueError, match="steps: 9"):
            worker.run(np.ones((1, 3), np.int64), 9)
    with Worker(spec(bundle, Kind.BUNDLE)) as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(MeasurementError, match=r"its process ended with code -9"):
            worker.run(np.ones((1, 3), np.int64), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "9"], "--steps: 9 | 0 to 5"),
        (["--batch", "0"], "--batch: 0 | 1 to"),
        (["--tokens", "4096"], "--tokens: 4096 | 1 to 48"),
        (["--repeats", "1"], "--repeats: 1 | 3 to"),
        (["--threads", "0"], "--threads: 0"),
        (["--precision", "fp8"], "precision 'fp8'"),
        (["--provider", "cuda"], "provider cuda: this onnxruntime has"),
        (["--sts", "nowhere.tsv"], "nowhere.tsv"),
        (["--against", "llama.cpp", "--gguf", "nowhere.gguf"], "nowhere.gguf"),
    ],
)
def test_command_errors(
    small_models: SmallModels, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert bench_command.main([str(small_models.bundle("llama")), *arguments]) == 2
    err = capsys.readouterr().err
    assert "gircse-bench: error: " in err
    assert message in err


def test_sides_need_names_of_their_own(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = small_models.bundle("llama")
    same_name = tmp_path / bundle.name
    same_name.symlink_to(bundle)
    assert bench_command.main([str(bundle), str(same_name)]) == 2
    assert f"two called {bundle.name}:fp32" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--against", "vllm"], ["--batch", "a"], []])
def test_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench_command.main(["bundle", *arguments] if arguments else arguments)
    assert caught.value.code == 2


def test_weight_traffic_by_hand(small_models: SmallModels) -> None:
    """Tied: the layers once for the prompt and once a step, the table twice a step, small constants besides."""
    model = small_models.load("llama")
    table = model.get_input_embeddings().weight.nbytes
    layers = sum(parameter.nbytes for parameter in model.parameters()) - table
    stepwise = Bundle.open(small_models.bundle("llama", layout="stepwise"))
    prompt = weight_bytes_read(stepwise, "fp32", steps=0)
    step = weight_bytes_read(stepwise, "fp32", steps=1) - prompt
    rotary = 2 * 128 * 4 * 4  # cos and sin of 128 positions, once or twice a layer
    assert layers <= prompt <= layers + 4 * rotary
    assert layers + 2 * table <= step <= layers + 2 * table + 4 * rotary
    unrolled = Bundle.open(small_models.bundle("llama"))
    total = weight_bytes_read(unrolled, "fp32", steps=5)
    assert total == pytest.approx(prompt + 5 * step, rel=0.01)
    assert weight_bytes_read(unrolled, "fp32", layout=Layout.STEPWISE, steps=0) == prompt


def test_bandwidth_is_plausible() -> None:
    assert 5e8 < memory_bandwidth(1) < 1e12
