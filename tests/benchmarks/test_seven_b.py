"""The benchmark of a 7B: weights that behave like trained ones, steps that resume, and what is measured of them."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import seven_b_checkpoint
import torch
from measured_process import measure
from safetensors.torch import load_file
from seven_b import Step, run_steps, steps_of
from seven_b_checkpoint import CONFIGS, MASSIVE, make_adapter, make_checkpoint
from seven_b_report import write_report

from gircse.calibration import calibrate_command
from gircse.checkpoint.reference import load_reference, refine
from gircse.checkpoint.source import resolve_checkpoint
from gircse.evaluation import parity_command
from gircse.export import export_command
from gircse.runtime import embed_command
from gircse.runtime.command import parse_arguments
from gircse.runtime.precision import Precision

DATA = Path(__file__).parents[1] / "data"
SINK = 5


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A shape with a small vocabulary, and a tokenizer that fits it without a download."""
    config = {**CONFIGS["0.5b"], "vocab_size": 4000, "intermediate_size": 256, "num_hidden_layers": 3}
    monkeypatch.setattr(seven_b_checkpoint, "CONFIGS", {"small": config})
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "tokenizer.json").write_bytes((DATA / "tokenizer.json").read_bytes())
    (demo / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr(seven_b_checkpoint, "demo_checkpoint", lambda: demo)
    return "small"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


def test_activations_are_those_of_a_trained_model(
    small_shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seven_b_checkpoint, "SHARD_BYTES", 4_000_000)
    monkeypatch.setattr(seven_b_checkpoint, "_write_tokenizer", lambda *_: (SINK, SINK + 1))
    make_checkpoint(small_shape, tmp_path / "model")
    make_adapter(small_shape, tmp_path / "adapter", base="model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    checkpoint = resolve_checkpoint(str(tmp_path / "model"), adapter=str(tmp_path / "adapter"))
    assert checkpoint.notes == ()
    model = load_reference(checkpoint, allow_partial_adapter=False)
    residual: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda *arguments: residual.append(arguments[2]))
    ids = torch.tensor([[SINK, 40, 700, 3000, 21], [SINK, 90, 11, 12, 2500]])
    states = list(refine(model, ids, torch.ones_like(ids), steps=3, temperature=1.0))
    assert residual[0][:, 0, list(MASSIVE)].abs().min() > 100
    assert residual[0][:, 1:].abs().max() < 10
    for state in states[1:]:
        assert state.probabilities is not None
        entropy = -(state.probabilities * state.probabilities.clamp_min(1e-30).log()).sum(-1)
        assert 0.2 < entropy.min() < entropy.max() < math.log(4000) - 1  # a margin of 5 nats would be 0.1
    noise = 1e-4 * seven_b_checkpoint.EMBEDDING_STD * torch.randn(2, 896, generator=torch.Generator().manual_seed(0))
    *_, disturbed = refine(
        model,
        ids,
        torch.ones_like(ids),
        steps=3,
        temperature=1.0,
        reweight=lambda probabilities: (probabilities, noise),
    )
    error = (disturbed.hidden - states[-1].hidden).norm(dim=1) / states[-1].hidden.norm(dim=1)
    assert error.max() < 1e-3  # ten times the noise that every step has added


def test_fewer_layers_are_the_first_ones(small_shape: str, tmp_path: Path) -> None:
    make_checkpoint(small_shape, tmp_path / "whole")
    make_checkpoint(small_shape, tmp_path / "two", layers=2)
    make_checkpoint(small_shape, tmp_path / "other", layers=2, seed=1)
    whole, two, other = (tensors(tmp_path / name) for name in ("whole", "two", "other"))
    assert two.keys() < whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in two.items() if name != "model.norm.weight")
    assert not any(torch.equal(value, two[name]) for name, value in other.items())


PARSERS = {
    "gircse-calibrate": calibrate_command.build_parser,
    "gircse-embed": embed_command.build_parser,
    "gircse-export": export_command.build_parser,
    "gircse-parity": parity_command.build_parser,
}


@pytest.mark.parametrize("shape", CONFIGS)
def test_commands_parse_and_read_what_was_made(shape: str, tmp_path: Path) -> None:
    made: set[str] = set()
    for step in steps_of(shape, tmp_path, None, (Precision.INT8, Precision.FP8)):
        assert {name for name in step.reads if not name.startswith("texts-")} <= made
        made |= set(step.writes)
        if step.argv[0] != sys.executable:
            parse_arguments(PARSERS[step.argv[0]](), list(step.argv[1:]))


def python_step(name: str, code: str, *, reads: tuple[str, ...] = (), writes: tuple[str, ...] = ()) -> Step:
    return Step(name, (sys.executable, "-c", code), reads, writes)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    scratch, results = tmp_path / "scratch", tmp_path / "results"
    scratch.mkdir()
    results.mkdir()
    return scratch, results


def counting_steps(scratch: Path) -> list[Step]:
    """Return a model, what is made of it, and what reads that; each run leaves a letter in a log."""
    log = scratch.parent / "log"
    make_model = f"""
import json, pathlib
model = pathlib.Path({str(scratch)!r}) / 'model'
model.mkdir()
(model / 'config.json').write_text(json.dumps(dict(num_hidden_layers=2)))
(model / 'model.safetensors.index.json').write_text(json.dumps(dict(metadata=dict(total_size=2000))))
"""
    write = "import pathlib; pathlib.Path({!r}).open('a').write({!r}); pathlib.Path({!r}).touch()"
    return [
        python_step("model", f"{make_model}\nopen({str(log)!r}, 'a').write('m')", writes=("model",)),
        python_step("a", write.format(str(log), "a", str(scratch / "a")), reads=("model",), writes=("a",)),
        python_step("b", write.format(str(log), "b", str(scratch / "b")), reads=("model", "a"), writes=("b",)),
    ]


def test_what_has_a_result_does_not_run_again(folders: tuple[Path, Path]) -> None:
    scratch, results = folders
    steps, log = counting_steps(scratch), scratch.parent / "log"
    assert not run_steps(steps, steps, scratch, results, keep=False)
    assert log.read_text() == "mab"
    assert not scratch.exists()
    scratch.mkdir()
    assert not run_steps(steps, steps, scratch, results, keep=False)
    assert log.read_text() == "mab"
    scratch.mkdir()
    (results / "b.json").unlink()
    assert not run_steps(steps, steps, scratch, results, keep=False)
    assert log.read_text() == "mabmab"  # what b reads was deleted after the first run


def test_a_failure_ends_the_run_and_is_no_result(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    scratch, results = folders
    steps = counting_steps(scratch)
    steps[1] = python_step("a", "raise SystemExit('out of luck')", reads=("model",), writes=("a",))
    assert run_steps(steps, steps, scratch, results, keep=False)
    assert [path.name for path in results.glob("*.json")] == ["model.json"]
    assert (scratch / "model").exists()
    assert "out of luck" in capsys.readouterr().out


def test_memory_is_that_of_a_command_and_its_children_together(tmp_path: Path) -> None:
    hold = "x = b'1' * (150 << 20); import time; time.sleep(1.5)"
    both = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}; child.wait()"
    alone, together = (measure((sys.executable, "-c", code), tmp_path) for code in (hold, both))
    assert 150 << 20 < alone.peak_memory < 250 << 20
    assert 300 << 20 < together.peak_memory < 400 << 20
    assert 300 << 20 < together.peak_anonymous < 400 << 20
    assert together.seconds > 1.5


def test_disk_is_what_a_command_wrote_at_most(tmp_path: Path) -> None:
    (tmp_path / "before").write_bytes(b"1" * 1000)
    code = f"import pathlib, time; f = pathlib.Path({str(tmp_path)!r}, 'x'); f.write_bytes(b'1' * 500); time.sleep(1.5)"
    assert measure((sys.executable, "-c", f"{code}; f.unlink()"), tmp_path).peak_disk == 500


def test_the_end_of_what_a_command_printed(tmp_path: Path) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = measure((sys.executable, "-c", code), tmp_path)
    assert done.exit_code == 3
    assert sorted(done.output.split()) == ["err", "out"]


def result(name: str, **change: Any) -> dict[str, Any]:
    return {
        "step": name,
        "parameters": 7_000_000_000,
        "settings": {"tokens": 16, "k": 4},
        "seconds": 600.0,
        "estimated_seconds": None,
        "peak_memory": 1 << 30,
        "peak_anonymous": 1 << 29,
        "bytes_read": None,
        "disk": 0,
        "peak_disk": 0,
        "exit_code": 0,
        "weights": None,
        "load_at_start": 0.0,
        "available_memory": 8 << 30,
        **change,
    }


@pytest.mark.parametrize(
    ("content", "verdict"),
    [
        (result("export-fp16"), "yes"),
        (result("export-fp16", peak_memory=7 << 30), "more than 6 GiB"),
        (result("export-fp16", seconds=1501.0), "more than 25 min"),
        (result("calibrate-off", estimated_seconds=500.0), "yes"),
        (result("calibrate-off", estimated_seconds=300.0), "2.00 times the estimate"),
        (result("calibrate-off", estimated_seconds=1000.0), "0.60 times the estimate"),
        (result("embed-int8", weights=1 << 30), "yes"),
        (result("embed-int8", weights=1 << 29), "2.00 times the weights, not 1.15"),
    ],
)
def test_the_report_says_what_was_missed(tmp_path: Path, content: dict[str, Any], verdict: str) -> None:
    (tmp_path / "qwen-7b").mkdir()
    (tmp_path / "qwen-7b" / "step.json").write_text(json.dumps(content))
    table, chart = write_report(tmp_path)
    row = next(line for line in table.read_text().splitlines() if line.startswith(f"| `{content['step']}`"))
    assert row.endswith(f"| {verdict} |")
    assert chart.read_bytes().startswith(b"\x89PNG")
