"""``gircse-parity`` as users run it: reports, exit codes, messages."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import msgspec
import pytest
from support.small_models import SmallModels
from support.task_data import STS, write

from gircse.evaluation import parity_command
from gircse.evaluation.parity.report_schema import ParityReport


def test_command_writes_the_report(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "new" / "report"
    bundle = small_models.bundle("llama")
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
    assert len(suite) == int(suite.attrib["tests"]) == len(found.candidates[0].gates) == 7
    assert suite.attrib["failures"] == "0"
    text = (report / "parity.md").read_text(encoding="utf-8")
    assert "# Parity of" in text
    last = found.candidates[0].steps[-1]
    assert f"| 5 | {1 - last.cosine_min:.1e} | {1 - last.cosine_mean:.1e} |" in text
    assert "![error-by-step](error-by-step.png)" in text


def test_command_fails_on_a_gate(small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = small_models.bundle("llama", layout="stepwise")
    arguments = [str(bundle), "--reference", str(small_models.bundle("llama")), "--report", str(tmp_path)]
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
        (["--reference", "nowhere"], "nowhere"),
        (["--reference", "{k3}"], "has steps 3; "),
        (["--reference", "{qwen2}"], "has architecture qwen2; "),
        (["--reference", "{bundle}"], "has no precision besides the reference"),
        (["--reference", "{bundle}:int4"], "precision 'int4'"),
        (["--precision", "fp8"], "precision 'fp8'"),
        (["--texts", "nowhere.txt"], "nowhere.txt"),
        (["--sts", "nowhere.tsv"], "nowhere.tsv"),
        (["--retrieval", "nowhere"], "--retrieval nowhere has no corpus.jsonl"),
        (["--model", "{other_model}"], "the SHA-256 of the config.json is"),
        (["--model", "nowhere"], "--model nowhere"),
        (["--device", "warp"], "--device warp cannot be used"),
        (["--threads", "0"], "threads is 0; the minimum is 1"),
        (["--provider", "cuda"], "provider cuda"),
        (["--report", "/proc/nowhere"], "--report /proc/nowhere"),
    ],
)
def test_command_cannot_measure(
    small_models: SmallModels, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    bundle = small_models.bundle("llama")
    places = {
        "bundle": bundle,
        "k3": small_models.bundle("llama", steps=3),
        "qwen2": small_models.bundle("qwen2"),
        "other_model": small_models.checkpoint("qwen2"),
    }
    assert parity_command.main([str(bundle), *(argument.format(**places) for argument in arguments)]) == 2
    err = capsys.readouterr().err
    assert "gircse-parity: error: " in err
    assert message in err


def test_reference_bundle_needs_no_torch(small_models: SmallModels) -> None:
    code = f"""
import sys
from importlib.abc import MetaPathFinder
class Refuse(MetaPathFinder):  # None in sys.modules would do, but scipy looks there for torch
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft", "onnxscript"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
from gircse.evaluation.parity_command import main
sys.exit(main([{str(small_models.bundle("llama"))!r}, "--reference",
               {str(small_models.bundle("llama", layout="stepwise"))!r}]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_missing_packages_are_named(
    small_models: SmallModels, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gircse.evaluation.parity.run", None)
    assert parity_command.main([str(small_models.bundle("llama"))]) == 2
    assert "pip install 'gircse-deploy[cpu,evaluation,export,demo]'" in capsys.readouterr().err


def test_lists_are_comma_separated() -> None:
    args = parity_command.build_parser().parse_args(["bundle", "--precision", "fp16,int8"])
    assert args.precisions == ("fp16", "int8")
