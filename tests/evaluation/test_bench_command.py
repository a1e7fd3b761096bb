"""``gircse-bench`` as users run it: reports, exit codes, messages."""

from pathlib import Path

import msgspec
import pytest
from support.small_models import SmallModels
from support.task_data import STS, write

from gircse.evaluation import bench_command
from gircse.evaluation.bench.report_schema import BenchReport

SMALL = ["--batch", "1,3", "--tokens", "4,9", "--repeats", "3", "--threads", "1"]


def test_the_report_tells_what_each_backend_has_run(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    *backends, torch = (cost.backend for cost in report.backends)
    measured = {(entry.backend, entry.batch, entry.tokens, entry.steps) for entry in report.latencies}
    for backend in (*backends, torch):
        assert {key[1:] for key in measured if key[0] == backend} == {
            (batch, tokens, steps) for batch in (1, 3) for tokens in (4, 9) for steps in (1, 5)
        }
    for entry in report.latencies:
        assert 0 < entry.seconds.low <= entry.seconds.median <= entry.seconds.p95 <= entry.seconds.high
        assert entry.seconds.repeats == 3
        assert entry.texts_per_s == pytest.approx(entry.batch / entry.seconds.median)
        assert (entry.roofline_s is None) == (entry.backend == torch)
    for cost in report.backends:
        assert cost.min_cosine > 0.99999  # every backend has computed the same
        assert cost.load_s.repeats == 3
        assert cost.peak_bytes > cost.model_bytes > 0
    for quality in report.quality:
        assert len(quality.scores) == 6
    assert report.quality[0].scores == pytest.approx(report.quality[1].scores, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "9"], "--steps is 9; the range is 0 to 5"),
        (["--batch", "0"], "--batch is 0; the range is 1 to"),
        (["--tokens", "4096"], "--tokens is 4096; the range is 1 to 48"),
        (["--repeats", "1"], "--repeats is 1; the range is 3 to"),
        (["--threads", "0"], "--threads is 0"),
        (["--precision", "fp8"], "precision 'fp8'"),
        (["--provider", "cuda"], "provider cuda"),
        (["--sts", "nowhere.tsv"], "nowhere.tsv"),
        (["--against", "llama.cpp", "--gguf", "nowhere.gguf"], "--gguf nowhere.gguf is not a file"),
    ],
)
def test_command_errors(
    small_models: SmallModels, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert bench_command.main([str(small_models.bundle("llama")), *arguments]) == 2
    err = capsys.readouterr().err
    assert "gircse-bench: error: " in err
    assert message in err


@pytest.mark.parametrize("arguments", [["--against", "vllm"], ["--batch", "a"], []])
def test_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench_command.main(["bundle", *arguments] if arguments else arguments)
    assert caught.value.code == 2


def test_lists_are_comma_separated() -> None:
    flags = ["--precision", "fp16,int8", "--batch", "1,4", "--against", "llama.cpp,torch"]
    args = bench_command.build_parser().parse_args(["one", "two", *flags])
    assert args.bundles == [Path("one"), Path("two")]
    assert (args.precisions, args.batches, args.against) == (("fp16", "int8"), (1, 4), ("llama.cpp", "torch"))
