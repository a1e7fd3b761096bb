"""Small engines on the simulated GPU, and the batches to run on them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gircse.runtime import tensor_names
from gircse.runtime.manifest import GraphFacts, Layout, Pooling
from gircse.runtime.provider import Provider
from gircse.runtime.session import StepOutputs
from gircse.runtime.trt.engine_manifest import (
    ENGINE_SCHEMA_VERSION,
    BuildRequest,
    EngineManifest,
    EngineProfile,
    ShapeRange,
    Stage,
)
from gircse.runtime.trt.memory_layout import MemoryLayout
from gircse.runtime.trt.session import TensorRtSession, open_tensorrt_session
from support.fake_cuda import FakeCuda
from support.fake_tensorrt import FakeTensorRt, tiny_run

STEPS = 3
MAX_TOKENS = 12


def make_facts(layout: Layout = Layout.STEPWISE, *, steps: int = STEPS, pooling: Pooling = Pooling.MEAN) -> GraphFacts:
    return GraphFacts(
        architecture="tiny",
        layout=layout,
        steps=steps,
        pooling=pooling,
        temperature=1.0,
        max_tokens=MAX_TOKENS,
        hidden_size=10,  # 40 bytes per vector: nothing is aligned by chance
        num_layers=2,
        kv_size=6,
        vocab_size=50,
    )


def profile(
    facts: GraphFacts,
    layout: Layout,
    *,
    name: str = "all",
    stage: Stage = Stage.ANY,
    batch: int = 4,
    tokens: tuple[int, int] = (1, MAX_TOKENS),
) -> EngineProfile:
    """Ranges that hold the prompt and every step."""
    memory = MemoryLayout(facts, layout, 2)
    low, high, last = (
        memory.input_shapes(1, tokens[0], 0),
        memory.input_shapes(batch, tokens[1], 0),
        memory.input_shapes(batch, tokens[1], memory.last_pass),
    )
    if memory.last_pass:
        low[tensor_names.INPUT_IDS] = (1, 0)
    largest = {key: tuple(map(max, high[key], last[key])) for key in high}
    return EngineProfile(name, stage, {key: ShapeRange(low[key], high[key], largest[key]) for key in high})


def make_manifest(
    facts: GraphFacts,
    layout: Layout,
    profiles: list[EngineProfile] | None = None,
    *,
    rtx: bool = False,
    weight_streaming: bool = False,
) -> EngineManifest:
    return EngineManifest(
        schema_version=ENGINE_SCHEMA_VERSION,
        bundle_sha256="",
        precision="fp16",
        layout=layout,
        provider=Provider.TENSORRT_RTX if rtx else Provider.TENSORRT,
        version="11.1.0",
        compute_capabilities=("8.9",),
        profiles=tuple(profiles or [profile(facts, layout)]),
        request=BuildRequest((1, 2, 4), weight_streaming=weight_streaming),
        settings={},
        build_seconds=1.0,
        plan_bytes=4,
        plan_sha256="",
    )


class Rig:
    """A session on a simulated GPU, and the batches to run on it."""

    def __init__(
        self,
        folder: Path,
        layout: Layout = Layout.STEPWISE,
        *,
        facts: GraphFacts | None = None,
        profiles: list[EngineProfile] | None = None,
        cache_type: str = "HALF",
        rtx: bool = False,
        graph_shapes: int = 2,
        weight_streaming: bool = False,
        prepare: Callable[[FakeTensorRt], None] = lambda module: None,
        cuda: FakeCuda | None = None,
    ) -> None:
        self.facts = facts or make_facts(layout)
        self.cache_type = cache_type if layout is Layout.STEPWISE else "FLOAT"
        self.cuda = cuda or FakeCuda()
        manifest = make_manifest(self.facts, layout, profiles, rtx=rtx, weight_streaming=weight_streaming)
        self.module = FakeTensorRt(self.cuda, self.facts, manifest, cache_type=self.cache_type, rtx=rtx)
        prepare(self.module)
        path = folder / "engine.plan"
        path.write_bytes(b"plan")
        bundle: Any = SimpleNamespace(directory=folder, manifest=SimpleNamespace(graph=self.facts))
        self.session: TensorRtSession = open_tensorrt_session(
            bundle, manifest, path, module=self.module, cuda=self.cuda, graph_shapes=graph_shapes
        )

    def run(self, batch: int, tokens: int, *, steps: int = STEPS, seed: int = 0) -> StepOutputs:
        """Run a random batch with padding on both sides, and compare it with the plain loop."""
        ids, mask = random_batch(batch, tokens, seed)
        before = ids.copy(), mask.copy()
        outputs = self.session.run(ids, mask, steps=steps)
        np.testing.assert_array_equal(ids, before[0])
        np.testing.assert_array_equal(mask, before[1])
        self.check(outputs, ids, mask, steps=steps)
        return outputs

    def run_after(self, prefix: int, batch: int, tokens: int, *, steps: int = STEPS, seed: int = 0) -> StepOutputs:
        """The same with prompts that begin with ``prefix`` common tokens."""
        rng = np.random.default_rng([prefix, seed])
        common, (ids, mask) = rng.integers(0, 50, prefix), random_batch(batch, tokens, seed)
        outputs = self.session.run_after(self.session.compute_prefix(common.tolist()), ids, mask, steps=steps)
        ones = np.ones((batch, prefix), np.int64)
        whole = np.concatenate([ones * common, ids], axis=1), np.concatenate([ones, mask], axis=1)
        self.check(outputs, *whole, steps=steps)
        return outputs

    def check(self, outputs: StepOutputs, ids: Any, mask: Any, *, steps: int) -> None:
        expected = tiny_run(self.facts, ids, mask, steps=steps, cache_type=self.cache_type)
        assert outputs.step_embeddings.shape == (len(ids), steps, self.facts.hidden_size)
        np.testing.assert_allclose(outputs.prompt_embedding, expected.prompt_embedding, atol=1e-5)
        np.testing.assert_allclose(outputs.step_embeddings, expected.step_embeddings, atol=1e-5)
        assert outputs.prompt_embedding.dtype == outputs.step_embeddings.dtype == np.float32


def stage_profiles(facts: GraphFacts) -> list[EngineProfile]:
    """Profiles of both stages for two batch sizes, and one for any stage."""
    return [
        profile(facts, Layout.STEPWISE, name=name, stage=stage, batch=batch, tokens=tokens)
        for name, stage, batch, tokens in (
            ("throughput", Stage.ANY, 8, (4, 12)),
            ("prompt-1", Stage.PROMPT, 1, (3, 12)),
            ("step-1", Stage.STEP, 1, (3, 12)),
            ("prompt-4", Stage.PROMPT, 4, (3, 9)),
            ("step-4", Stage.STEP, 4, (3, 9)),
        )
    ]


def random_batch(batch: int, tokens: int, seed: int) -> tuple[Any, Any]:
    """Prompts padded left or right or not at all."""
    rng = np.random.default_rng([batch, tokens, seed])
    ids = rng.integers(0, 50, (batch, tokens))
    mask = np.zeros((batch, tokens), np.int64)
    for row in mask:
        length = rng.integers(1, tokens + 1)
        start = rng.integers(0, tokens - length + 1)
        row[start : start + length] = 1
    return ids, mask


MakeRig = Callable[..., Rig]
"""The fixture ``rig`` of ``tests/runtime/trt``."""
