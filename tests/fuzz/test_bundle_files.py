"""Damaged files of a bundle: the vectors are those of the bundle as it was exported, or there is one clear error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.damage import damaged_bytes, damaged_document, damaged_safetensors
from support.outcomes import result_or_error
from support.small_models import SmallModels, rehash

from gircse.runtime import Embedder, GircseError
from gircse.runtime.numerics import Float32
from gircse.runtime.provider import Provider

TEXTS = ["how do I reset the card", "", "the small bird sings"]
EMPTY = TEXTS.index("")


class BundleUnderTest:
    """A copy of a bundle whose files are replaced, and the bundle itself on the CPU."""

    def __init__(self, original: Path, copy: Path) -> None:
        self.original, self.copy = original, copy
        self.embedder = open_bundle(original)
        shutil.copytree(original, copy)

    def content(self, name: str) -> bytes:
        return (self.original / name).read_bytes()

    def vectors_of(self, token_ids: list[list[int]]) -> Float32:
        """Return the vectors of token ids by the original, in one batch."""
        return self.embedder.run_batch(token_ids).embedding


@pytest.fixture(scope="module")
def subject(small_models: SmallModels, tmp_path_factory: pytest.TempPathFactory) -> BundleUnderTest:
    original = small_models.bundle("qwen2", steps=2, layout="stepwise")
    return BundleUnderTest(original, tmp_path_factory.mktemp("fuzz") / "bundle")


@pytest.fixture
def _restore(subject: BundleUnderTest) -> None:
    shutil.copytree(subject.original, subject.copy, dirs_exist_ok=True)


def open_bundle(bundle: Path) -> Embedder:
    return Embedder(bundle, threads=1, provider=Provider.CPU)


def embed(bundle: Path, use: Callable[[Embedder], object] = lambda embedder: None) -> tuple[Float32, Float32, int]:
    """Return the vectors of the texts without and with an instruction, and the padding token."""
    with open_bundle(bundle) as embedder:
        use(embedder)
        return embedder.encode(TEXTS), embedder.encode(TEXTS, instruction="Find it"), embedder.manifest.pad_token_id


@pytest.mark.usefixtures("_restore")
@given(data=st.data())
def test_manifest(subject: BundleUnderTest, data: st.DataObject) -> None:
    (subject.copy / "gircse.json").write_bytes(data.draw(damaged_document(subject.content("gircse.json"))))
    found = result_or_error(lambda: embed(subject.copy))
    if found is not None:
        plain, instructed, pad = found
        expected = subject.embedder.encode(TEXTS)
        expected[EMPTY] = subject.vectors_of([[pad]])[0]  # a bundle says only once what stands for an empty text
        np.testing.assert_array_equal(instructed, subject.embedder.encode(TEXTS, instruction="Find it"))
        np.testing.assert_allclose(plain, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["x\0y", "x" * 300, "x" * 70_000, "..", ".", "", "a\nb", "tokenizer.json/x"])
@pytest.mark.usefixtures("_restore")
def test_manifest_with_a_name_that_no_file_has(subject: BundleUnderTest, name: str) -> None:
    manifest = json.loads(subject.content("gircse.json"))
    manifest["files"][name] = manifest["files"]["tokenizer.json"]
    (subject.copy / "gircse.json").write_text(json.dumps(manifest))
    assert result_or_error(lambda: embed(subject.copy)) is None


@pytest.mark.usefixtures("_restore")
@given(data=st.data())
def test_a_changed_file_is_refused_by_its_hash(subject: BundleUnderTest, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(subject.embedder.manifest.files)))
    content = subject.content(name)
    damaged = data.draw(damaged_bytes(content))
    assume(damaged != content)
    (subject.copy / name).write_bytes(damaged)
    with pytest.raises(GircseError):
        embed(subject.copy)
    (subject.copy / name).write_bytes(content)


@pytest.mark.usefixtures("_restore")
@given(data=st.data())
def test_tokenizer_whose_hash_agrees(subject: BundleUnderTest, data: st.DataObject) -> None:
    (subject.copy / "tokenizer.json").write_bytes(data.draw(damaged_document(subject.content("tokenizer.json"))))
    rehash(subject.copy)
    token_ids: list[list[int]] = []
    found = result_or_error(lambda: embed(subject.copy, lambda embedder: token_ids.extend(embedder.tokenizer(TEXTS))))
    if found is not None:
        np.testing.assert_allclose(found[0], subject.vectors_of(token_ids), atol=1e-6)


@pytest.mark.usefixtures("_restore")
@pytest.mark.parametrize(
    ("name", "damages"), [("golden.json", damaged_document), ("golden.safetensors", damaged_safetensors)]
)
@given(data=st.data())
def test_golden_vectors_whose_hash_agrees(
    subject: BundleUnderTest, data: st.DataObject, name: str, damages: Callable[[bytes], st.SearchStrategy[bytes]]
) -> None:
    (subject.copy / name).write_bytes(data.draw(damages(subject.content(name))))
    rehash(subject.copy)
    found = result_or_error(lambda: embed(subject.copy, Embedder.self_test))
    if found is not None:
        np.testing.assert_array_equal(found[0], subject.embedder.encode(TEXTS))
