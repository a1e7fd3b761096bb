"""``gircse-triton``: what it writes, and what it refuses."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from support import engine_rig
from support.small_models import SmallModels, add_stepwise_variants
from support.tolerances import BATCH_MAX_DIFFERENCE
from support.triton_server import model_config_type

from gircse.runtime import Embedder, Manifest
from gircse.runtime.bundle import file_sha256
from gircse.runtime.manifest import Layout
from gircse.serving import triton_command


def write(bundle: Path, output: Path, *flags: str) -> None:
    assert triton_command.main([str(bundle), "--output", str(output), *flags]) == 0


def refusal(capsys: pytest.CaptureFixture[str], bundle: Path, output: Path, *flags: str) -> str:
    before = sorted(output.parent.rglob("*"))
    assert triton_command.main([str(bundle), "--output", str(output), *flags]) == 2
    assert sorted(output.parent.rglob("*")) == before
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def config_of(model: Path) -> Any:
    config = text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), model_config_type()())
    assert config.name == model.name
    return config


def parameters(config: Any) -> dict[str, str]:
    return {name: value.string_value for name, value in config.parameters.items()}


def tensors(listed: Any) -> dict[str, tuple[int, list[int]]]:
    return {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in listed}


def add_engine(
    bundle: Path, capability: str = "8.9", *, version: str = "10.16.1", batches: tuple[int, ...] = (4,)
) -> str:
    """Add an unrolled engine of TensorRT, whose plan nothing loads; returns the name of the plan."""
    facts = Manifest.from_json((bundle / "gircse.json").read_bytes()).graph
    plan = f"plan of {capability}".encode()
    engine = msgspec.structs.replace(
        engine_rig.make_manifest(
            facts,
            Layout.UNROLLED,
            [engine_rig.profile(facts, Layout.UNROLLED, name=str(size), batch=size) for size in batches],
        ),
        precision="fp32",
        version=version,
        compute_capabilities=(capability,),
        bundle_sha256=file_sha256(bundle / "gircse.json"),
        plan_bytes=len(plan),
        plan_sha256=hashlib.sha256(plan).hexdigest(),
    )
    (bundle / "engines").mkdir(exist_ok=True)
    (bundle / "engines" / f"{engine.name}.json").write_bytes(engine.to_json())
    (bundle / "engines" / f"{engine.name}.plan").write_bytes(plan)
    return f"{engine.name}.plan"


def test_the_text_model(small_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "models"
    write(small_bundle, output, "--threads", "2", "--max-batch-size", "64")
    config = config_of(output / "gircse")
    types = type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name
    text, int32, fp32 = (types[f"TYPE_{name}"].number for name in ("STRING", "INT32", "FP32"))
    assert (config.backend, config.max_batch_size) == ("python", 64)
    assert tensors(config.input) == {"TEXT": (text, [1]), "STEPS": (int32, [1]), "INSTRUCTION": (text, [1])}
    assert [tensor.optional for tensor in config.input] == [False, True, True]
    assert tensors(config.output) == {"EMBEDDING": (fp32, [48])}
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, group.KIND_CPU)
    assert parameters(config) == {
        "bundle": str(small_bundle),
        "provider": "cpu",
        "precision": "fp32",
        "layout": "stepwise",
        "threads": "2",
        "verify": "true",
    }
    assert sorted(path.name for path in output.rglob("*")) == ["1", "config.pbtxt", "gircse", "model.py"]
    assert capsys.readouterr().out.splitlines() == [
        "gircse: texts to vectors, fp32 stepwise on cpu",
        f"tritonserver --model-repository={output}",
    ]


def test_on_a_gpu(small_bundle: Path, tmp_path: Path) -> None:
    write(small_bundle, tmp_path / "models", "--provider", "cuda", "--no-verify", "--models", "text,onnx")
    for model in ("gircse", "gircse_onnx"):
        (group,) = config_of(tmp_path / "models" / model).instance_group
        assert (group.count, group.kind, list(group.gpus)) == (1, group.KIND_GPU, [0])
    text = parameters(config_of(tmp_path / "models" / "gircse"))
    assert (text["provider"], text["layout"], text["verify"]) == ("cuda", "unrolled", "false")


def test_any_path_survives_the_configuration(small_bundle: Path, tmp_path: Path) -> None:
    moved = small_bundle.rename(tmp_path / "a \"quoted\" \\ 'Größe'\n bundle")
    write(moved, tmp_path / "models")
    assert parameters(config_of(tmp_path / "models" / "gircse"))["bundle"] == str(moved)


@pytest.mark.parametrize("copy", [False, True], ids=["linked", "copied"])
def test_the_graph_runs_where_it_lies(copy: bool, small_bundle: Path, tmp_path: Path) -> None:
    with Embedder(small_bundle, provider="cpu", layout="unrolled") as embedder:
        ids = embedder.tokenizer(["how do I reset the card"])
        expected = embedder.encode(["how do I reset the card"])
    output = tmp_path / "models"
    write(small_bundle, output, "--models", "onnx", "--threads", "1", *(["--copy"] if copy else []))
    if copy:
        shutil.rmtree(small_bundle)
    config = config_of(output / "gircse_onnx")
    assert config.platform == "onnxruntime_onnx"
    assert parameters(config) == {"intra_op_thread_count": "1"}
    graph = onnxruntime.InferenceSession(output / "gircse_onnx" / "1" / "model.onnx")  # Triton's name of the file
    types = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}
    numbers = type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name
    for declared, found in ((config.input, graph.get_inputs()), (config.output, graph.get_outputs())):
        assert tensors(declared) == {
            tensor.name: (
                numbers[types[tensor.type]].number,
                [size if isinstance(size, int) else -1 for size in tensor.shape[1:]],
            )
            for tensor in found
        }
    inputs = {"input_ids": np.array(ids), "attention_mask": np.ones((1, len(ids[0])), np.int64)}
    (vectors,) = graph.run(["embedding"], inputs)
    np.testing.assert_allclose(vectors, expected, atol=BATCH_MAX_DIFFERENCE)


@pytest.mark.parametrize("copy", [False, True], ids=["linked", "copied"])
def test_engines(copy: bool, small_bundle: Path, tmp_path: Path) -> None:
    """The server takes the plan of its GPU, in the profile of the largest batches."""
    plans = {capability: add_engine(small_bundle, capability, batches=(1, 16)) for capability in ("8.9", "9.0")}
    output = tmp_path / "models"
    write(small_bundle, output, "--models", "plan", *(["--copy"] if copy else []))
    config = config_of(output / "gircse_plan")
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 16)
    assert list(tensors(config.output)) == ["embedding", "step_embeddings", "prompt_embedding"]
    assert config.cc_model_filenames == plans
    (group,) = config.instance_group
    assert (group.kind, list(group.profile)) == (group.KIND_GPU, ["1"])
    for capability, plan in plans.items():
        assert (output / "gircse_plan" / "1" / plan).read_bytes() == f"plan of {capability}".encode()
    assert (output / "gircse_plan" / "1").is_symlink() is not copy


def test_engines_that_cannot_be(small_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ("--models", "plan")
    output = tmp_path / "models"
    assert "has no unrolled engine" in refusal(capsys, small_bundle, output, *plan)
    path = small_bundle / "engines" / add_engine(small_bundle, batches=(4, 1))
    assert "has no unrolled engine of fp16" in refusal(capsys, small_bundle, output, *plan, "--precision", "fp16")
    content = path.read_bytes()
    path.write_bytes(content[::-1])
    assert "has another SHA-256" in refusal(capsys, small_bundle, output, *plan)
    path.write_bytes(content)
    add_engine(small_bundle, "9.0", batches=(1, 4))
    assert "have different profiles" in refusal(capsys, small_bundle, output, *plan)
    add_engine(small_bundle, version="10.17.0")
    assert "has two engines for compute capability 8.9" in refusal(capsys, small_bundle, output, *plan)
    edited = json.loads((small_bundle / "gircse.json").read_text())
    (small_bundle / "gircse.json").write_text(json.dumps(edited | {"query_instruction": "other"}))
    assert "it was built from another export" in refusal(capsys, small_bundle, output, *plan)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model-name", "a/b"], "--model-name is 'a/b'"),
        (["--max-batch-size", "0"], "--max-batch-size is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--precision", "fp16"], "has no precision 'fp16'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(
    flags: list[str], message: str, small_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, small_bundle, tmp_path / "models", *flags)


def test_a_precision_without_the_graph(small_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_stepwise_variants(small_bundle, "int8", "bf16")
    output = tmp_path / "models"
    message = refusal(capsys, small_bundle, output, "--models", "text,onnx", "--precision", "int8")
    assert "has no unrolled graph" in message
    assert "provider cpu does not run bf16" in refusal(capsys, small_bundle, output, "--precision", "bf16")
    assert "provider cuda does not run int8" in refusal(
        capsys, small_bundle, output, "--precision", "int8", "--provider", "cuda"
    )


def test_a_damaged_graph_is_not_written(small_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_bundle / "fp32" / "weights.bin"
    path.write_bytes(bytes(path.stat().st_size))
    assert "was changed or damaged" in refusal(capsys, small_bundle, tmp_path / "models", "--models", "text,onnx")
    write(small_bundle, tmp_path / "models", "--models", "text,onnx", "--no-verify")


def test_nothing_is_overwritten(small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, output = small_models.bundle("qwen2"), tmp_path / "models"
    output.mkdir()
    write(bundle, output)  # an empty folder is one to fill
    capsys.readouterr()
    assert f"{output} exists and is not empty" in refusal(capsys, bundle, output)
    (tmp_path / "file").write_text("mine")
    assert "exists and is no folder" in refusal(capsys, bundle, tmp_path / "file")
