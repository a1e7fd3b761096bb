"""A backend in its own process gives the right vectors, and its errors reach the parent."""

import os
import signal

import numpy as np
import pytest
from support.small_models import SmallModels
from support.tolerances import SMALL_MODEL_MAX_DIFFERENCE

from gircse.checkpoint.source import resolve_checkpoint
from gircse.evaluation.bench.backends import BundleSpec, TorchSpec
from gircse.evaluation.bench.worker import Worker
from gircse.runtime import Embedder, MeasurementError
from gircse.runtime.bundle import Bundle


def test_worker_runs_what_it_is_given(small_models: SmallModels) -> None:
    bundle = small_models.bundle("llama", layout="stepwise")
    ids = np.random.default_rng(0).integers(0, 500, (3, 9))
    embedder = Embedder(bundle)
    wanted = embedder.run_batch(ids.tolist(), steps=3).embedding
    opened, checkpoint = Bundle.open(bundle), resolve_checkpoint(str(small_models.checkpoint("llama")))
    for spec in (BundleSpec(opened, "fp32", threads=1), TorchSpec(opened, checkpoint, "fp32", threads=1)):
        with Worker(spec) as worker:
            seconds, vectors = worker.run(ids, 3)
            assert seconds > 0
            assert worker.load_s > 0
            np.testing.assert_allclose(vectors, wanted, atol=SMALL_MODEL_MAX_DIFFERENCE)
            _, prompt = worker.run(ids, 0)
            assert np.abs(prompt - wanted).max() > 0.01
            assert worker.peak_bytes() > 50 << 20


def test_worker_errors_reach_the_parent(small_models: SmallModels) -> None:
    spec = BundleSpec(Bundle.open(small_models.bundle("llama", layout="stepwise")), "fp32", threads=1)
    with Worker(spec) as worker:
        with pytest.raises(ValueError, match="steps"):
            worker.run(np.ones((1, 3), np.int64), 9)
    with Worker(spec) as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(MeasurementError, match=r":fp32 was killed by SIGKILL\. Most likely memory ran out"):
            worker.run(np.ones((1, 3), np.int64), 1)
