"""The official loop in PyTorch as it is measured: the same states as the reference, and marks where its parts begin."""

import json
from pathlib import Path

import pytest
import torch
from support.small_models import SmallModels
from torch_steps import Timeline, main, official_loop, summary

from gircse.checkpoint.reference import step_states

STEPS = 3


@pytest.mark.parametrize("last_vocabulary", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3-softcap-linear"])
def test_the_loop_computes_the_states_of_the_reference(
    small_models: SmallModels, name: str, last_vocabulary: bool
) -> None:
    model = small_models.load(name)
    ids = torch.randint(1, 500, (2, 7), generator=torch.Generator().manual_seed(1))
    found = official_loop(model, ids, steps=STEPS, temperature=0.7, last_vocabulary=last_vocabulary)
    expected = step_states(model, ids, torch.ones_like(ids), steps=STEPS, temperature=0.7)[:, 1:]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("last_vocabulary", [True, False])
def test_parts_are_marked_where_they_begin(small_models: SmallModels, last_vocabulary: bool) -> None:
    marks: list[str] = []
    official_loop(
        small_models.load("llama"),
        torch.ones((1, 4), dtype=torch.int64),
        steps=STEPS,
        temperature=1.0,
        last_vocabulary=last_vocabulary,
        mark=marks.append,
    )
    passes = ["decoder", "vocabulary"] * STEPS + ["decoder"]
    assert marks == [*passes, *(["vocabulary"] if last_vocabulary else []), "end"]


def test_times_lie_between_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.5, 0.75, 1.75, 3.75, 8.0])
    monkeypatch.setattr("torch_steps.time.perf_counter", lambda: next(times))
    timeline = Timeline("cpu")
    for part in ("decoder", "vocabulary", "decoder", "vocabulary", "decoder", "end"):
        timeline.mark(part)
    parts = timeline.milliseconds()
    assert [length for _, length in parts] == [500.0, 250.0, 1000.0, 2000.0, 4250.0]
    assert summary(parts) == {
        "prompt": 500.0,
        "step": 2625.0,
        "prompt vocabulary": 250.0,
        "step vocabulary": 2000.0,
    }


def test_the_command_writes_what_it_measured(small_models: SmallModels, tmp_path: Path) -> None:
    bundle, model = small_models.bundle("llama"), small_models.checkpoint("llama")
    output = tmp_path / "new" / "steps.json"
    sizes = ["--batch", "1,2", "--tokens", "3", "--steps", "1", "--dtype", "fp32"]
    assert main([str(bundle), "--model", str(model), "--device", "cpu", *sizes, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert [(entry["batch"], entry["last_vocabulary"]) for entry in found] == [
        (1, True),
        (1, False),
        (2, True),
        (2, False),
    ]
    assert all(entry["milliseconds"]["total"] > 0 for entry in found)
