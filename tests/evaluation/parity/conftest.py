"""A small bundle, and what PyTorch computes of the built-in texts with its checkpoint."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.small_models import SmallModels

from gircse.checkpoint.reference_choice import ReferenceOptions
from gircse.evaluation.parity.backends import TorchBackend
from gircse.evaluation.parity.references import source_checkpoint
from gircse.evaluation.parity.step_trace import StepTrace
from gircse.evaluation.tasks.prompts import read_prompts, tokenize_prompts
from gircse.runtime.bundle import Bundle
from gircse.runtime.tokenization import open_tokenizer


@pytest.fixture(scope="session")
def bundle(small_models: SmallModels) -> Path:
    """A bundle of a llama: AutoTokenizer takes its tokenizer.json as it is, and no rules of the model type."""
    return small_models.bundle("llama")


@pytest.fixture
def bundle_copy(bundle: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


@pytest.fixture(scope="session")
def token_ids(bundle: Path) -> list[list[int]]:
    return tokenize_prompts(open_tokenizer(Bundle.open(bundle)), read_prompts(None)[:24])


@pytest.fixture(scope="session")
def reference(bundle: Path, small_models: SmallModels, token_ids: list[list[int]]) -> tuple[np.ndarray, StepTrace]:
    """z_0..z_K and the trace of PyTorch."""
    opened = Bundle.open(bundle)
    checkpoint = source_checkpoint(opened.manifest, model=str(small_models.checkpoint("llama")))
    backend = TorchBackend(opened, checkpoint, ReferenceOptions(), threads=2)
    return backend.embed_and_trace(token_ids, lambda _: None)
