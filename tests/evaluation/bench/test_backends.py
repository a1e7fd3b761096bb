"""What each backend is called, which steps it can stop after, and how large its files are."""

from pathlib import Path

import pytest
from support.small_models import SmallModels

from gircse.checkpoint.source import Checkpoint, resolve_checkpoint
from gircse.evaluation.bench.backends import BundleSpec, LlamaCppSpec, TorchSpec
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider


@pytest.fixture
def checkpoint(small_models: SmallModels) -> Checkpoint:
    return resolve_checkpoint(str(small_models.checkpoint("llama")))


def test_names_tell_precision_and_device(small_models: SmallModels, checkpoint: Checkpoint) -> None:
    bundle = Bundle.open(small_models.bundle("llama"))
    name = bundle.directory.name
    assert BundleSpec(bundle, "fp32", 1).name == f"{name}:fp32"
    assert BundleSpec(bundle, "fp32", 1, provider=Provider.CUDA).name == f"{name}:fp32 on cuda"
    assert BundleSpec(bundle, "fp32", 1, cached_instruction=18).name == f"{name}:fp32, cached instruction"
    assert TorchSpec(bundle, checkpoint, "fp16", 1).name == "torch fp16"
    assert TorchSpec(bundle, checkpoint, "fp16", 1, device="cuda").name == "torch fp16 on cuda"
    assert (
        LlamaCppSpec(bundle, checkpoint, Path("x.gguf"), "Q8_0", 1, batch=1, tokens=1, steps=1).name == "llama.cpp Q8_0"
    )


def test_steps_that_each_can_stop_after(small_models: SmallModels, checkpoint: Checkpoint) -> None:
    bundle = Bundle.open(small_models.bundle("llama"))  # K = 5
    specs = (
        BundleSpec(bundle, "fp32", 1, layout=Layout.UNROLLED),
        BundleSpec(bundle, "fp32", 1),
        TorchSpec(bundle, checkpoint, "fp32", 1),
        LlamaCppSpec(bundle, checkpoint, Path("x.gguf"), "Q8_0", 1, batch=1, tokens=1, steps=5),
    )
    assert [[spec.can_run(steps) for steps in (0, 1, 5)] for spec in specs] == [
        [False, False, True],
        [True, True, True],
        [True, True, True],
        [False, True, True],
    ]


def test_model_files(small_models: SmallModels, checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = Bundle.open(small_models.bundle("llama"))
    folder = bundle.directory / "fp32"
    graph = bundle.graph("fp32", Layout.UNROLLED)
    wanted = (folder / "weights.bin").stat().st_size + graph.stat().st_size
    assert BundleSpec(bundle, "fp32", 1, layout=Layout.UNROLLED).model_bytes() == wanted
    weights = small_models.checkpoint("llama") / "model.safetensors"
    assert TorchSpec(bundle, checkpoint, "fp32", 1).model_bytes() == weights.stat().st_size
    (tmp_path / "x.gguf").write_bytes(b"123")
    assert LlamaCppSpec(bundle, checkpoint, tmp_path / "x.gguf", "x", 1, batch=1, tokens=1, steps=1).model_bytes() == 3


def test_only_graphs_on_the_cpu_have_a_roofline(small_models: SmallModels, checkpoint: Checkpoint) -> None:
    bundle = Bundle.open(small_models.bundle("llama"))
    assert BundleSpec(bundle, "fp32", 1).weight_bytes_read(5) > 0
    assert BundleSpec(bundle, "fp32", 1, provider=Provider.CUDA).weight_bytes_read(5) is None
    assert TorchSpec(bundle, checkpoint, "fp32", 1).weight_bytes_read(5) is None
