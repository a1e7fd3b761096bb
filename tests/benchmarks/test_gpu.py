"""What would be measured on a GPU: commands that exist, in an order that works, and their table."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import gpu
import gpu_plan
import pytest
from gpu_report import write_report
from support.small_models import SmallModels
from timed_commands import Command, Outcome, Status, run_commands

from gircse.evaluation import bench_command, parity_command
from gircse.evaluation.bench.report_schema import BackendCost, BenchReport, Latency, Spread
from gircse.export import build_command, export_command
from gircse.runtime import embed_command
from gircse.runtime.bundle import Bundle
from gircse.runtime.command import parse_arguments
from gircse.runtime.provider import Provider

PARSERS = {
    "gircse-export": export_command.build_parser,
    "gircse-build": build_command.build_parser,
    "gircse-embed": embed_command.build_parser,
    "gircse-parity": parity_command.build_parser,
    "gircse-bench": bench_command.build_parser,
}


def planned(*arguments: str) -> list[Command]:
    return list(gpu_plan.commands(gpu.parse_options(arguments)))


@pytest.mark.parametrize(
    "arguments", [[], ["qwen2.5-7b", "--precision", "fp16,bf16"], ["m", "--providers", "cpu", "--steps", "1"]]
)
def test_commands_parse_and_need_earlier_ones(arguments: list[str]) -> None:
    seen: set[str] = set()
    for command in planned(*arguments):
        assert command.name not in seen
        assert set(command.needs) <= seen
        seen.add(command.name)
        if parser := PARSERS.get(command.argv[0]):
            parse_arguments(parser(), list(command.argv[1:]))
        else:
            assert command.argv[0] in (sys.executable, "gircse-embed-cpp")


def test_the_most_valuable_come_first() -> None:
    names = [command.name for command in planned() if not command.name.startswith("small-")]
    assert names[:4] == [
        "export",
        "parity-cuda-stepwise",
        "latency-cuda-unrolled-fp16",
        "latency-cuda-stepwise-fp16",
    ]


def test_local_models_and_adapters_are_named_wherever_pytorch_runs(tmp_path: Path) -> None:
    """A bundle holds the names of their folders only."""
    model, adapter = tmp_path / "m", tmp_path / "a"
    model.mkdir()
    adapter.mkdir()
    for arguments, flags in (
        ([], ()),
        (["org/model", "--adapter", "org/adapter"], ()),
        (["qwen2.5-7b"], ("--model", "RESULTS/model")),
        ([str(model), "--adapter", str(adapter)], ("--model", str(model), "--adapter", str(adapter))),
    ):
        commands = planned(*arguments, "--results", str(tmp_path / "r"))
        wanted = tuple(flag.replace("RESULTS", str(tmp_path / "r")) for flag in flags)
        torch = [
            command
            for command in commands
            if "--dtype" in command.argv or (command.argv[0] == "gircse-parity" and "--reference" not in command.argv)
        ]
        assert len(torch) > 5
        for command in torch:
            at = command.argv.index("--model") if "--model" in command.argv else 0
            assert command.argv[at : at + len(wanted)] == wanted or not wanted
            assert ("--adapter" in command.argv) == ("--adapter" in wanted)
            assert ("--model" in command.argv) == ("--model" in wanted)


def test_nothing_runs_after_a_failed_self_test(tmp_path: Path) -> None:
    """Every command of the plan needs the self-tests of the first provider, directly or not."""
    broken = [
        Command(
            command.name,
            ("no-such-program",) if command.name == "small-cpu-fp16" else (sys.executable, "-c", ""),
            60,
            command.needs,
            command.missing,
        )
        for command in planned("--providers", "cpu,tensorrt")
    ]
    outcomes = run_commands(broken, tmp_path, deadline=float("inf"))
    ran = [outcome.name for outcome in outcomes if outcome.status is Status.DONE]
    assert ran == ["small-model", "small-export", "small-cpu-fp32"]


def test_a_missing_provider_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "needs the package tensorrt" in (gpu_plan.why_missing(Provider.TENSORRT) or "")
    assert gpu_plan.why_missing(Provider.CPU) is None


@pytest.mark.parametrize(
    ("command", "libraries", "reason"),
    [
        (None, ["libonnxruntime.so.1"], "gircse-embed-cpp is not installed (docs/cpp.md)"),
        ("/usr/bin/gircse-embed-cpp", [], "the package onnxruntime has no libonnxruntime.so"),
        ("/usr/bin/gircse-embed-cpp", ["libonnxruntime.so.1"], None),
    ],
)
def test_the_cpp_runtime_is_optional(
    monkeypatch: pytest.MonkeyPatch, command: str | None, libraries: list[str], reason: str | None
) -> None:
    monkeypatch.setattr(gpu_plan.shutil, "which", lambda _: command)
    monkeypatch.setattr(gpu_plan, "onnxruntime_libraries", lambda: [Path(name) for name in libraries])
    cpp = [command for command in planned() if command.name.startswith("cpp-cuda-")]
    assert [command.missing for command in cpp] == [reason] * 3
    assert all(command.environment.get("GIRCSE_ONNXRUNTIME") == (None if reason else libraries[0]) for command in cpp)


def test_results_of_another_machine_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.of_this_machine(tmp_path)
    assert gpu.of_this_machine(tmp_path)
    monkeypatch.setattr(gpu, "describe_environment", lambda: {"gpu": "another"})
    assert not gpu.of_this_machine(tmp_path)


def bench_report(backends: dict[str, float]) -> bytes:
    spreads = {name: Spread(seconds, seconds, seconds, seconds, 5) for name, seconds in backends.items()}
    return BenchReport(
        schema_version=1,
        threads=2,
        warm_up=2,
        bandwidth=1e9,
        backends=tuple(BackendCost(name, spread, 1, 1, 1.0) for name, spread in spreads.items()),
        latencies=tuple(Latency(name, 8, 24, 5, spread, 1.0, None) for name, spread in spreads.items()),
        quality=(),
        environment={},
    ).to_json()


@pytest.fixture
def outcome(tmp_path: Path) -> Callable[..., Outcome]:
    """Make the outcome of a planned command."""
    plan = {command.name: command for command in planned("m", "--providers", "cpu", "--results", str(tmp_path))}

    def make(name: str, status: Status = Status.DONE, output: str = "") -> Outcome:
        return Outcome(name, plan[name].argv, status, 0, 1.0, output)

    return make


def test_the_table_has_times_and_what_has_none(
    small_models: SmallModels, tmp_path: Path, outcome: Callable[..., Outcome]
) -> None:
    bundle = small_models.bundle("llama", precisions=("fp32", "fp16"))
    report = tmp_path / "latency-cpu-stepwise-fp16"
    report.mkdir()
    (report / "bench.json").write_bytes(bench_report({"bundle:fp16": 0.0125, "torch fp16": 0.05}))
    weights = Bundle.open(bundle).directory / "fp16" / "weights.bin"
    steps = tmp_path / "torch-steps" / "steps.json"
    steps.parent.mkdir()
    times = {"total": 40.0, "prompt": 4.0, "prompt vocabulary": 2.0, "step": 5.5, "step vocabulary": 1.5}
    entry = {"batch": 8, "tokens": 24, "steps": 5, "dtype": "fp16", "last_vocabulary": True, "milliseconds": times}
    lean = {**entry, "last_vocabulary": False, "milliseconds": {**times, "total": 38.0}}
    steps.write_text(json.dumps([entry, lean]))
    text = write_report(
        [
            outcome("torch-steps"),
            outcome("bandwidth", output=str(float(weights.stat().st_size))),
            outcome("latency-cpu-stepwise-fp16"),
            outcome("latency-cpu-unrolled-fp16", Status.FAILED, "noise\nout of memory\n"),
            outcome("small-cpu-fp32", output="self-test passed: fp32\n"),
        ],
        tmp_path,
        bundle,
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:6]}
    fp16 = table["cpu, stepwise, fp16, k = 5"]
    assert fp16["8 x 24, ms"] == "12.5"
    # Six passes through the decoder and five through the vocabulary, at one weights file per second.
    assert 4000 < float(fp16["reading the weights, ms"]) < 11000
    assert table["torch fp16, beside cpu, stepwise, fp16, k = 5"]["8 x 24, ms"] == "50.0"
    assert fp16["most texts/s"] == "640"
    assert table["torch fp16, official loop, k = 5"]["8 x 24, ms"] == "40.0"
    assert table["torch fp16, official loop without the last vocabulary pass, k = 5"]["8 x 24, ms"] == "38.0"
    assert ["8 x 24", "40.00", "4.00", "2.00", "5.50", "1.50"] in rows
    assert ["failed: out of memory", "latency-cpu-unrolled-fp16"] in rows
    assert ["small-cpu-fp32", "self-test passed: fp32"] in rows
    assert (tmp_path / "results.md").read_text() == text
