"""Polygraphy's own command takes the golden inputs and outputs, passes a sound graph and fails a damaged one."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.small_models import SmallModels, edit_manifest, scale_weights

from gircse.evaluation import parity_command
from gircse.evaluation.parity import polygraphy_files
from gircse.evaluation.parity.polygraphy_files import write_polygraphy_files
from gircse.runtime import BundleError
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider
from gircse.runtime.self_test import read_golden_vectors

polygraphy_json = pytest.importorskip("polygraphy.json", reason="the extra polygraphy is not installed")
COMMAND = Path(sys.executable).with_name("polygraphy")


def run(command: str) -> subprocess.CompletedProcess[str]:
    program, *arguments = shlex.split(command)
    assert program == "polygraphy"
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, check=False)


def test_polygraphy_passes_a_sound_graph_and_fails_a_damaged_one(
    bundle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands as they are printed."""
    assert parity_command.main([str(bundle_copy), "--polygraphy", str(tmp_path / "new" / "files")]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert [re.findall(r"fp32/(\w+)\.onnx", command) for command in commands] == [["stepwise"], ["model"]]
    outputs = (["next_hidden"], ["embedding", "step_embeddings", "prompt_embedding"])
    for command, compared in zip(commands, outputs, strict=True):
        done = run(command)
        assert done.returncode == 0, done.stderr
        assert "Passed: 12/12 iterations" in done.stdout
        assert f"All outputs matched | Outputs: {compared}" in done.stdout
    scale_weights(bundle_copy, 0.5, 1.0, 1.2)
    done = run(commands[1])
    assert done.returncode == 1
    assert "FAILED" in done.stdout


def test_files_hold_the_golden_vectors(bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    write_polygraphy_files(opened, tmp_path)
    golden, facts = read_golden_vectors(opened), opened.manifest.graph
    from polygraphy.comparator import RunResults

    for layout in Layout:
        stem = "unrolled" if layout is Layout.UNROLLED else "stepwise-float32"
        inputs = polygraphy_json.load_json(str(tmp_path / f"{stem}-inputs.json"))
        assert [feed["input_ids"].tolist() for feed in inputs] == [[ids] for ids in golden.token_ids]
        assert all((feed["attention_mask"] == 1).all() for feed in inputs)
        ((name, iterations),) = RunResults.load(str(tmp_path / f"{layout}-outputs.json"))
        assert name == "PyTorch FP32 (golden vectors)"
        assert len(iterations) == len(inputs) == 12
        for vectors, found in zip(golden.vectors, iterations, strict=True):
            if layout is Layout.STEPWISE:
                np.testing.assert_array_equal(found["next_hidden"], vectors[None, :1])
                continue
            np.testing.assert_array_equal(found["step_embeddings"][0], vectors[1:])
            np.testing.assert_array_equal(found["embedding"], vectors[-1:])
            np.testing.assert_array_equal(found["prompt_embedding"], vectors[:1])
    assert inputs[0]["past.1.value"].shape == (1, 0, facts.kv_size)
    assert inputs[0]["hidden"].shape == (1, 0, facts.hidden_size)


def test_a_cache_has_its_own_type_and_bf16_is_left_out(small_models: SmallModels, tmp_path: Path) -> None:
    bundle = Bundle.open(small_models.bundle("llama", precisions=("fp32", "fp16", "bf16"), layout="stepwise"))
    written = write_polygraphy_files(bundle, tmp_path)
    assert [re.findall(r"/(\w+)/stepwise.onnx .*-(float\d+)-inputs", line)[0] for line in written.commands] == [
        ("fp32", "float32"),
        ("fp16", "float16"),
    ]
    inputs = polygraphy_json.load_json(str(tmp_path / "stepwise-float16-inputs.json"))
    assert (inputs[0]["past.0.key"].dtype, inputs[0]["hidden"].dtype) == (np.float16, np.float32)
    (left_out,) = written.left_out
    assert re.search(r"bf16/stepwise\.onnx: its KV cache is BF16", left_out)
    with pytest.raises(BundleError, match=r"has nothing to be fed: .*bf16.* Choose another --precision"):
        write_polygraphy_files(bundle, tmp_path / "nothing", precisions=("bf16",))


def test_engines_are_run_by_the_tensorrt_that_built_them(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, layers = (
        SimpleNamespace(
            precision="fp32",
            layout=Layout.STEPWISE,
            provider=Provider.TENSORRT_RTX,
            request=SimpleNamespace(layer_outputs=shown),
        )
        for shown in (False, True)
    )
    found = [(engine, Path("it's.plan")), (layers, Path("layers.plan"))]  # which takes inputs that no file has
    monkeypatch.setattr(polygraphy_files, "read_engines", lambda _: found)
    *_, command = write_polygraphy_files(Bundle.open(bundle), tmp_path).commands
    setting, *words = shlex.split(command)
    assert setting == "POLYGRAPHY_USE_TENSORRT_RTX=1"
    assert words[:6] == ["polygraphy", "run", "it's.plan", "--model-type", "engine", "--trt"]
    assert words[7] == str(tmp_path / "stepwise-float32-inputs.json")


def test_a_bundle_without_golden_vectors_is_refused(bundle_copy: Path, tmp_path: Path) -> None:
    edit_manifest(bundle_copy, lambda manifest: manifest.update(golden=False, golden_missing_reason="left out"))
    with pytest.raises(BundleError, match="has no golden vectors"):
        write_polygraphy_files(Bundle.open(bundle_copy), tmp_path)
    assert list(tmp_path.glob("*.json")) == []


@pytest.mark.parametrize("flags", [["--locate"], ["--report", "report"]])
def test_what_needs_a_comparison_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert parity_command.main([str(bundle), "--polygraphy", str(tmp_path / "files"), *flags]) == 2
    assert "--polygraphy compares nothing; --report and --locate need a comparison" in capsys.readouterr().err
    assert not (tmp_path / "files").exists()


def test_a_missing_polygraphy_is_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("polygraphy", "polygraphy.json", "polygraphy.comparator"):
        monkeypatch.setitem(sys.modules, name, None)
    assert parity_command.main([str(bundle), "--polygraphy", str(tmp_path)]) == 2
    assert "pip install 'gircse-deploy[cpu,evaluation,polygraphy]'" in capsys.readouterr().err


def test_the_files_need_no_torch(bundle: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from importlib.abc import MetaPathFinder
class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft", "onnxscript"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
from gircse.evaluation.parity_command import main
sys.exit(main([{str(bundle)!r}, "--polygraphy", {str(tmp_path)!r}]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "unrolled-inputs.json").exists()


def test_tensorrt_takes_every_layer_as_an_output_by_its_name(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has packages for Linux on x86-64 only")
    names = ["decoder/layer.0", "decoder/layer.1"]
    code = f"""
from polygraphy.backend.trt import ModifyNetworkOutputs, NetworkFromOnnxPath
network = NetworkFromOnnxPath({str(bundle / "fp32" / "stepwise.onnx")!r}, strongly_typed=True)
_, marked, _ = ModifyNetworkOutputs(network, outputs={names})()
assert [marked.get_output(at).name for at in range(marked.num_outputs)] == {names}
"""
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
