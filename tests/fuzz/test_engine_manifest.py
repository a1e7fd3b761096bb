"""Damaged manifests of engines: the engine computes what it always did, or there is one clear error."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.damage import damaged_document
from support.engine_rig import STEPS, make_facts, make_manifest, random_batch, stage_profiles
from support.fake_cuda import FakeCuda
from support.fake_tensorrt import FakeTensorRt, tiny_run
from support.outcomes import result_or_error

from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider
from gircse.runtime.session import StepOutputs
from gircse.runtime.trt.engine_manifest import EngineManifest, select_engine
from gircse.runtime.trt.session import open_tensorrt_session

PLAN = b"plan"
FACTS = make_facts()
IDS, MASK = random_batch(2, 7, 0)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineManifest]:
    """A folder with a plan, and the manifest that belongs to it."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "gircse.json").write_bytes(b"{}")
    (folder / "engines").mkdir()
    (folder / "engines" / "it.plan").write_bytes(PLAN)
    made = make_manifest(FACTS, Layout.STEPWISE, stage_profiles(FACTS))
    hashes = {"bundle_sha256": hashlib.sha256(b"{}").hexdigest(), "plan_sha256": hashlib.sha256(PLAN).hexdigest()}
    return folder, replace(made, plan_bytes=len(PLAN), **hashes)


def run(folder: Path, engine: EngineManifest) -> StepOutputs:
    """Select the engine as ``Embedder`` does, load it on the simulated GPU, and run one batch."""
    manifest: Any = SimpleNamespace(graph=FACTS, variants={"fp16": None, "fp32": None})
    bundle = Bundle(folder, manifest)
    found, plan = select_engine(
        bundle,
        provider=Provider.TENSORRT,
        version="11.1.0",
        capability="8.9",
        precisions=("fp16", "fp32"),
        layout=None,
        verify=True,
    )
    cuda = FakeCuda()
    with open_tensorrt_session(bundle, found, plan, module=FakeTensorRt(cuda, FACTS, engine), cuda=cuda) as session:
        return session.run(IDS, MASK, steps=STEPS)


@given(data=st.data())
def test_engine_manifest(built: tuple[Path, EngineManifest], data: st.DataObject) -> None:
    folder, engine = built
    (folder / "engines" / "it.json").write_bytes(data.draw(damaged_document(engine.to_json())))
    outputs = result_or_error(lambda: run(folder, engine))
    if outputs is not None:
        expected = tiny_run(FACTS, IDS, MASK, steps=STEPS, cache_type="HALF")
        np.testing.assert_allclose(outputs.prompt_embedding, expected.prompt_embedding, atol=1e-5)
        np.testing.assert_allclose(outputs.step_embeddings, expected.step_embeddings, atol=1e-5)
