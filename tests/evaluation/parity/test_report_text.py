"""A parity report for people and for CI."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from rich.console import Console

from gircse.evaluation.parity.gates import at_least, at_most
from gircse.evaluation.parity.report_layers import layer_markdown
from gircse.evaluation.parity.report_schema import (
    BatchVariance,
    CandidateReport,
    CrossSteps,
    LayerJump,
    LayerReport,
    ParityReport,
    SoftTokens,
    StepParity,
    TaskParity,
    TextParity,
)
from gircse.evaluation.parity.report_text import junit, markdown, terminal_tables
from gircse.evaluation.tasks.prompts import Prompt


@pytest.fixture
def report() -> ParityReport:
    tokens = SoftTokens(entropy=1.5, top1_mass=0.25, padded_mass=0.0, norm=2.0)
    steps = tuple(
        StepParity(step, 0.9996, 0.9999, 0.98, 1.01, 0.003, 0.9991, 0.97, 1.0, 1.0, tokens if step else None)
        for step in (0, 1)
    )
    candidate = CandidateReport(
        precision="fp16",
        passed=False,
        gates=(at_least("cosine", 0.9996, 0.9995), at_most("drop of Spearman, pairs", 0.1, 0.002)),
        steps=steps,
        texts=tuple(TextParity((1.0, cosine), (1.0, 1.0), (0.0, 0.0)) for cosine in (0.9999, 0.9996)),
        batch_variance=BatchVariance(texts=2, max_difference=0.001, cosine_min=1.0000001),
        tasks=(TaskParity("pairs", "Spearman", (0.8, 0.9), (0.8, 0.8), -0.2, 0.05),),
        cross_steps=CrossSteps("rank correlation", None, ((0.5,),)),
        prefix_variance=BatchVariance(texts=3, max_difference=0.002, cosine_min=0.9999),
    )
    return ParityReport(1, "demo", "0" * 64, "PyTorch", 1, 2, "built-in", (tokens,), (candidate,), {"cores": "2"})


def test_markdown(report: ParityReport) -> None:
    text = markdown(report, [Prompt("fine"), Prompt("a | bad\none" + "x" * 60)])
    assert text.startswith("# Parity of demo: FAILED\n\n2 texts (built-in) against PyTorch, K = 1.")
    for line in (
        "| pass | cosine | 0.9996000 | >= 0.9995 |",
        "| **FAIL** | drop of Spearman, pairs | 0.1 | <= 0.002 |",
        "| 1 | 4.0e-04 | 1.0e-04 | 0.9800 | 3.0e-03 | 0.99910 | 0.970 | 0.0e+00 | 0.0e+00 |",
        "| 1 | 0.9000 | 0.8000 | -0.1000 |",
        "| 1 | reference | 1.500 | 0.250 | 0.0e+00 | 2.000 |",
        "| 1 | fp16 | 1.500 | 0.250 | 0.0e+00 | 2.000 |",
        "| cores | 2 |",
        "Prefix variance: 3 texts after an instruction that was run once against whole prompts: "
        "largest difference 2.0e-03, largest 1 - cosine 1.0e-04.",
    ):
        assert line in text.splitlines(), line
    worst = [line for line in text.splitlines() if "bad" in line]
    assert worst[0].startswith("| 1 | 4.0e-04 | a \\| bad one")
    assert worst[0].endswith("… |")


def test_junit(report: ParityReport) -> None:
    (suite,) = ET.fromstring(junit(report))
    assert (suite.attrib["name"], suite.attrib["tests"], suite.attrib["failures"]) == ("demo:fp16", "2", "1")
    passed, failed = suite
    assert passed.find("failure") is None
    assert failed.find("failure").attrib["message"] == "drop of Spearman, pairs: 0.1, limit <= 0.002"


def test_terminal(report: ParityReport) -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    for table in terminal_tables(report):
        console.print(table)
    text = console.export_text()
    assert "demo:fp16 against PyTorch, 2 texts" in text
    assert "pass  cosine 0.9996000 >= 0.9995" in text
    assert "FAIL  drop of Spearman, pairs 0.1 <= 0.002" in text
    assert "pairs, Spearman: 0.8000, reference 0.9000 (95 % of the difference -0.2000 to +0.0500)" in text


def test_layers_that_stand_out_are_listed_with_their_first_step() -> None:
    alone, running = np.full((3, 5), 1e-3), np.full((3, 5), 2e-3)
    alone[1:, 2] = 0.25, 0.5
    running[1, 2] = 0.04
    jumps = (LayerJump(1, "layer 1", 0.25, 250.0), LayerJump(2, "layer 1", 0.5, 500.0))
    text = "\n".join(layer_markdown(LayerReport(4, as_rows(alone), as_rows(running), jumps)))
    assert "### Layers, text 4" in text
    assert "| layer 1 | 1 | 2 | 5.0e-01 | 500 |" in text
    assert "1 of 5 parts stand out" in text
    assert "the largest is 5.0e-01 (step 2, layer 1)" in text
    assert "grows most at step 1, layer 1: from 2.0e-03 to 4.0e-02; at the end it is 2.0e-03." in text


def test_layers_without_a_jump_are_summed_up() -> None:
    errors = np.array([[1e-3, 2e-3, 3e-3, 1e-3], [1e-3, 2e-3, 3e-3, 4e-3]])
    text = "\n".join(layer_markdown(LayerReport(4, as_rows(errors), as_rows(errors), ())))
    assert "no part stands out: errors of the layers alone have a median of 2.5e-03" in text
    assert "|" not in text


def as_rows(errors: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, errors.tolist()))
