"""A parity report for people and for CI."""

import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from gircse.evaluation.parity.gates import at_least, at_most
from gircse.evaluation.parity.report_schema import (
    BatchVariance,
    CandidateReport,
    CrossSteps,
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
