"""Options and bundles that no engine can be built from, refused by the real TensorRT for RTX where it matters."""

import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from support.engine_build import RTX, Build, Refuse
from support.fake_cuda import FakeCuda
from support.small_models import SmallModels, rehash

from gircse.runtime.manifest import Layout


def test_no_such_precision(rtx: Any, bundle: Path, refuse: Refuse) -> None:
    message = refuse(bundle, "--precision", "int4", *RTX)
    assert all(part in message for part in ("int4", "bf16, fp16, fp32"))


def test_no_such_layout(rtx: Any, small_models: SmallModels, refuse: Refuse) -> None:
    """K = 0 has one graph."""
    message = refuse(small_models.bundle("llama", steps=0, layout=Layout.UNROLLED), *RTX)
    assert all(part in message for part in ("stepwise", "unrolled"))


def test_no_bundle(tmp_path: Path, refuse: Refuse) -> None:
    message = refuse(tmp_path, *RTX)
    assert str(tmp_path) in message
    assert "gircse.json" in message


def test_no_gpu_and_none_named(rtx: Any, bundle: Path, refuse: Refuse) -> None:
    message = refuse(bundle, "--provider", "tensorrt-rtx")
    assert "0 NVIDIA GPUs are visible" in message
    assert message.endswith("To build for the GPU of another machine, name it: --sm 8.9")


@pytest.mark.parametrize("capability", ["9.0", "1.0", "89", "sm89", "8.9,9.0", "8.9,", ""])
def test_capability_that_rtx_does_not_build_for(rtx: Any, bundle: Path, refuse: Refuse, capability: str) -> None:
    message = refuse(bundle, "--provider", "tensorrt-rtx", "--sm", capability)
    assert message.startswith(
        f"--sm has {capability.split(',')[-1]!r}; this tensorrt-rtx {rtx.__version__} builds for "
    )
    assert " 8.9, " in message


def test_gpu_that_rtx_does_not_build_for(
    rtx: Any, bundle: Path, gpu: None, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeCuda, "compute_capability", lambda _: "9.0")
    message = refuse(bundle, "--provider", "tensorrt-rtx")
    assert message.startswith("this machine's GPU has compute capability 9.0; this tensorrt-rtx ")
    assert message.endswith("Use --provider tensorrt here, or name the GPU of another machine: --sm 8.9")


def test_sm_120_is_capability_12_0(rtx: Any, bundle: Path, refuse: Refuse) -> None:
    assert "12.0" in refuse(bundle, "--provider", "tensorrt-rtx", "--sm", "1.20")


@pytest.mark.parametrize("flags", [("--tokens", "1:64:512"), ("--tokens", "49"), ("--profiles", "a=1x49")])
def test_more_tokens_than_the_bundle_takes(rtx: Any, bundle: Path, refuse: Refuse, flags: tuple[str, str]) -> None:
    message = refuse(bundle, *flags, *RTX)
    assert re.match(
        r"profile \w+ has prompts of \d+ tokens; the bundle takes at most 48\. Lower --tokens, or ", message
    )


@pytest.mark.parametrize(
    ("profiles", "expected"),
    [
        ("a=1,b=2,a=3", "--profiles names a profile twice: a, b, a."),
        ("a", "--profiles 'a' is not NAME=BATCH or NAME=BATCHxTOKENS. "),
        ("a=8:1", "--profiles 'a=8:1': '8:1' is not a range of sizes from 1 to 2147483647, in order. "),
    ],
)
def test_bad_profiles(rtx: Any, bundle: Path, refuse: Refuse, profiles: str, expected: str) -> None:
    assert refuse(bundle, *RTX, "--profiles", profiles).startswith(expected)


@pytest.mark.parametrize("workspace", ["0", "-1", "nan", "inf", "1e30"])
def test_bad_workspace(rtx: Any, bundle: Path, refuse: Refuse, workspace: str) -> None:
    message = refuse(bundle, "--workspace-gib", workspace, *RTX)
    assert message.startswith(f"--workspace-gib is {float(workspace)}; it can be above 0, up to ")


def test_build_that_rtx_cannot_make(rtx: Any, bundle: Path, refuse: Refuse) -> None:
    """No kernel runs in ten kilobytes of workspace; TensorRT's own words are passed on."""
    message = refuse(bundle, "--workspace-gib", "0.00001", *RTX)
    assert message.startswith(f"tensorrt-rtx {rtx.__version__} cannot build the engine: ")
    assert "workspace" in message.split(" Change what the build needs")[0]


def test_operators_that_are_refused_are_named(rtx: Any, bundle: Path, refuse: Refuse) -> None:
    path = bundle / "fp16" / "stepwise.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("Unique", ["input_ids"], ["odd"], name="odd_node"))
    onnx.save(model, path)
    rehash(bundle)
    message = refuse(bundle, *RTX)
    assert message.startswith(f"{path} is refused by tensorrt-rtx {rtx.__version__}: Unique (odd_node): ")
    assert "Report this graph, and use ONNX Runtime" in message


def test_file_that_is_not_a_graph(rtx: Any, bundle: Path, refuse: Refuse) -> None:
    path = bundle / "fp16" / "stepwise.onnx"
    path.write_bytes(b"no graph at all")
    rehash(bundle)
    assert refuse(bundle, *RTX).startswith(f"{path} is refused by tensorrt-rtx ")
    path.write_bytes(b"")  # TensorRT takes it for a network without inputs
    rehash(bundle)
    assert refuse(bundle, *RTX).startswith(
        "the graph has the inputs []; this gircse-deploy builds from ['attention_mask', "
    )


@pytest.mark.parametrize("name", ["fp16/weights.bin", "fp16/stepwise.onnx", "tokenizer.json"])
def test_changed_bundle(rtx: Any, bundle: Path, refuse: Refuse, build: Build, name: str) -> None:
    path = bundle / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = refuse(bundle, *RTX)
    assert all(part in message for part in (name, "SHA-256"))
    if "fp16" in name:
        build(bundle, "--precision", "fp32", *RTX)  # another variant is not concerned
