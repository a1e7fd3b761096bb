"""Damaged and foreign bundles: C++ refuses what Python refuses, in the same words."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save
from support.cpp_library import PYTHON_ERRORS, CppError, CppLibrary
from support.damage import damaged_document, damaged_safetensors
from support.small_models import SmallModels, add_stepwise_variants, edit_manifest, point_weights_at, rehash

from gircse.runtime import BundleError, Embedder, GircseError
from gircse.runtime.numerics import Float32

TEXTS = ["how do I reset the card", "", "the small bird sings"]

OWN_WORDS = [
    (r"\[ONNXRuntimeError\] : \d+ : \w+ : ", ""),
    (r"this gircse-deploy", "this libgircse"),
    (r"Upgrade: pip install -U gircse-deploy$", "Upgrade libgircse."),
    (r"(?<=cannot be read: )JSON is malformed: .*(?=\. (Export|Copy))", "malformed"),
    (r"(?<=cannot be read: )JSON is malformed at byte \d+(?=\. (Export|Copy))", "malformed"),
]
"""What each runtime says in words of its own: its name, those of its JSON parser, and a prefix of the Python module."""


@pytest.fixture(scope="module")
def library(cpp_library: Path, onnxruntime_library: Path) -> CppLibrary:
    return CppLibrary(cpp_library, onnxruntime_library)


def in_common_words(message: str) -> str:
    for pattern, replacement in OWN_WORDS:
        message = re.sub(pattern, replacement, message)
    return message


def cpp_error(library: CppLibrary, bundle: Path, *, self_test: bool = False, **options: Any) -> CppError | None:
    try:
        with library.open(bundle, **{"provider": "cpu", **options}) as subject:
            if self_test:
                subject.self_test()
    except CppError as err:
        return err
    return None


def python_error(bundle: Path, *, self_test: bool = False, **options: Any) -> GircseError | None:
    try:
        with Embedder(bundle, **{"provider": "cpu", **options}) as subject:
            if self_test:
                subject.self_test()
    except GircseError as err:
        return err
    return None


def assert_same_error(library: CppLibrary, bundle: Path, **options: Any) -> str:
    """Compare class and message of both errors, and return the message."""
    expected = python_error(bundle, **options)
    found = cpp_error(library, bundle, **options)
    assert expected is not None
    assert found is not None, str(expected)
    assert PYTHON_ERRORS[found.code] is type(expected)
    assert in_common_words(found.message) == in_common_words(str(expected))
    return found.message


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "newer schema": lambda m: m.update(schema_version=4),
    "newer schema with a field of its own": lambda m: m.update(schema_version=4, something_new=[1]),
    "older schema": lambda m: m.update(schema_version=0),
    "schema that is text": lambda m: m.update(schema_version="3"),
    "schema that is a fraction": lambda m: m.update(schema_version=3.5),
    "no schema": lambda m: m.pop("schema_version"),
    "no graph": lambda m: m.pop("graph"),
    "graph that is null": lambda m: m.update(graph=None),
    "unknown field": lambda m: m.update(extra=1),
    "unknown field of a graph": lambda m: m["graph"].update(extra=1),
    "unknown field of a variant": lambda m: m["variants"]["fp32"].update(extra=1),
    "unknown field of an input": lambda m: m["variants"]["fp32"]["graphs"]["stepwise"]["inputs"][0].update(extra=1),
    "unknown field of a file": lambda m: m["files"]["tokenizer.json"].update(extra=1),
    "steps that are text": lambda m: m["graph"].update(steps="8"),
    "steps that are a fraction": lambda m: m["graph"].update(steps=2.5),
    "hidden size that is text": lambda m: m["graph"].update(hidden_size="48"),
    "temperature that is text": lambda m: m["graph"].update(temperature="1"),
    "golden that is a number": lambda m: m.update(golden=1),
    "shape that is text": lambda m: m["variants"]["fp32"]["graphs"]["stepwise"]["inputs"][0].update(shape="2"),
    "shape of nothing": lambda m: m["variants"]["fp32"]["graphs"]["stepwise"]["inputs"][0].update(shape=[None]),
    "unknown layout": lambda m: m["variants"]["fp32"]["graphs"].update(
        other=m["variants"]["fp32"]["graphs"]["stepwise"]
    ),
    "unknown layout of a rewrite": lambda m: m["variants"]["fp32"].update(rewrites={"other": {}}),
    "rewrites that are text": lambda m: m["variants"]["fp32"].update(rewrites={"stepwise": {"a": "1"}}),
    "float32 that is text": lambda m: m["variants"]["fp32"].update(float32="norms"),
    "unknown tokenizer": lambda m: m.update(tokenizer="other"),
    "unknown truncation side": lambda m: m.update(truncation_side="middle"),
    "unknown pooling": lambda m: m["graph"].update(pooling="max"),
    "suffix that is null": lambda m: m.update(prompt_suffix=None),
    "model that is text": lambda m: m.update(model="demo"),
    "adapter without name": lambda m: m.update(adapter={"revision": None, "sha256": "a"}),
    "revision that is a number": lambda m: m["model"].update(revision=1),
    "tool that is a number": lambda m: m["tools"].update(torch=2),
    "another layout": lambda m: m["graph"].update(layout="stepwise"),
    "no stepwise graph": lambda m: m["variants"]["fp32"]["graphs"].pop("stepwise"),
    "no graphs": lambda m: m["variants"]["fp32"]["graphs"].clear(),
    "weights without an entry": lambda m: m["files"].pop("fp32/weights.bin"),
    "tokenizer without an entry": lambda m: m["files"].pop("tokenizer.json"),
    "golden texts without an entry": lambda m: m["files"].pop("golden.json"),
    "no variants": lambda m: m.update(variants={}),
    "padding token beyond the vocabulary": lambda m: m.update(pad_token_id=520),
    "negative padding token": lambda m: m.update(pad_token_id=-1),
    "name with a line break": lambda m: m.update({"a\nb": 1}),
    "long name": lambda m: m.update({"x" * 70_000: 1}),
    "name of characters that do not print": lambda m: m.update({"\x1b[31m\u202e\u200b\ufeff\x7f\x85": 1}),
    "long file name": lambda m: m["files"].update({"x" * 300: m["files"]["golden.json"]}),
    "file that is a folder": lambda m: m["files"].update({"fp32": m["files"]["golden.json"]}),
    "file in a file": lambda m: m["files"].update({"golden.json/x": m["files"]["golden.json"]}),
    "template without a place": lambda m: m.update(prompt_template="no place"),
    "template with two places": lambda m: m.update(prompt_template="{text} it's {text}"),
    "template with odd characters": lambda m: m.update(prompt_template="a'b\"c\n\t\\ \x1b ü 😀 \u200b"),
    "other template": lambda m: m.update(prompt_template="Query: {text}"),
    "size of another file": lambda m: m["files"]["golden.json"].update(bytes=1),
    "negative size": lambda m: m["files"]["golden.json"].update(bytes=-1),
    "hash of another file": lambda m: m["files"]["golden.json"].update(sha256=m["files"]["tokenizer.json"]["sha256"]),
    "hash in capitals": lambda m: m["files"]["golden.json"].update(sha256=m["files"]["golden.json"]["sha256"].upper()),
    "graph of other facts": lambda m: m["graph"].update(temperature=2.0, max_tokens=47),
    "other vocabulary": lambda m: m["graph"].update(vocab_size=519),
    "absolute path": lambda m: m["files"].update({"/etc/hostname": m["files"]["golden.json"]}),
    "path that leaves": lambda m: m["files"].update({"../outside": m["files"]["golden.json"]}),
    "path that leaves and returns": lambda m: m["files"].update({"fp32/../../b": m["files"]["golden.json"]}),
    "path of a graph that leaves": lambda m: m["variants"]["fp32"]["graphs"]["stepwise"].update(path="../x"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_bad_manifests_give_the_same_error(library: CppLibrary, small_bundle: Path, name: str) -> None:
    edit_manifest(small_bundle, CHANGES[name])
    if name == "other template":  # Python names its tokenizers too
        found = cpp_error(library, small_bundle)
        assert found is not None
        expected = (
            r"gives golden text 4 other tokens than at the export; that was with tokenizers \S+\. If gircse\.json "
        )
        assert re.search(expected, found.message)
        assert cpp_error(library, small_bundle, verify=0) is None  # the user's own choice
    else:
        assert_same_error(library, small_bundle)


@pytest.mark.parametrize(
    "facts", [{"steps": 65}, {"steps": -1}, {"temperature": 0.0}, {"temperature": -1.0}, {"hidden_size": 0}]
)
def test_values_that_no_export_writes(library: CppLibrary, small_bundle: Path, facts: dict[str, Any]) -> None:
    edit_manifest(small_bundle, lambda m: m["graph"].update(facts))
    found, (name, value) = cpp_error(library, small_bundle), next(iter(facts.items()))
    assert isinstance(python_error(small_bundle), BundleError)
    assert found is not None
    assert 'gircse.json has values that no export writes: {"architecture":"qwen2",' in found.message
    assert f'"{name}":{value}' in found.message
    assert found.message.endswith("and the temperature is above 0. Export the bundle again.")


def test_a_name_with_a_nul_cannot_be_a_path(library: CppLibrary, small_bundle: Path) -> None:
    edit_manifest(small_bundle, lambda m: m["files"].update({"x\0y": m["files"]["golden.json"]}))
    found = cpp_error(library, small_bundle)
    assert isinstance(python_error(small_bundle), BundleError)
    assert found is not None
    assert found.message.startswith(r"gircse.json has the path 'x\x00y', which cannot be one: ")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000, b'{"a":' * 100_000])
def test_a_manifest_that_is_no_json_object(library: CppLibrary, small_bundle: Path, content: bytes) -> None:
    (small_bundle / "gircse.json").write_bytes(content)
    found = cpp_error(library, small_bundle)
    assert isinstance(python_error(small_bundle), BundleError)
    assert found is not None
    assert PYTHON_ERRORS[found.code] is BundleError
    assert re.fullmatch(r"gircse\.json cannot be read: [^\n]{,300}\. Export the bundle again\.", found.message)


def test_no_bundle_there(library: CppLibrary, tmp_path: Path) -> None:
    assert "is not a bundle" in assert_same_error(library, tmp_path)
    (tmp_path / "gircse.json").mkdir()
    assert_same_error(library, tmp_path)
    assert_same_error(library, tmp_path / "ünïcödé")
    assert_same_error(library, tmp_path / "gircse.json" / "x")


@pytest.mark.parametrize("name", ["", "."])
def test_the_folder_itself_is_no_file(library: CppLibrary, small_bundle: Path, name: str) -> None:
    edit_manifest(small_bundle, lambda m: m["files"].update({name: m["files"]["golden.json"]}))
    found = cpp_error(library, small_bundle)
    assert isinstance(python_error(small_bundle), BundleError)
    assert found is not None
    assert PYTHON_ERRORS[found.code] is BundleError
    assert re.search(r"bundle[/.]* is missing; the manifest says \d+ bytes\. Copy", found.message)


@pytest.mark.parametrize("name", ["fp32/weights.bin", "fp32/stepwise.onnx", "golden.json", "golden.safetensors"])
def test_files_that_are_missing_short_or_flipped(library: CppLibrary, small_bundle: Path, name: str) -> None:
    path = small_bundle / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "was changed or damaged: its SHA-256 is" in assert_same_error(library, small_bundle)
    path.write_bytes(content[:-1])
    assert f"has {len(content) - 1} bytes" in assert_same_error(library, small_bundle)
    path.unlink()
    assert "is missing" in assert_same_error(library, small_bundle)


def test_a_damaged_file_may_be_opened_unverified(library: CppLibrary, small_bundle: Path) -> None:
    path = small_bundle / "fp32" / "weights.bin"
    data = bytearray(path.read_bytes())
    data[4242] ^= 16
    path.write_bytes(data)
    assert_same_error(library, small_bundle)
    assert cpp_error(library, small_bundle, verify=0) is None


def test_a_damaged_graph_is_blamed_on_its_hash(library: CppLibrary, small_bundle: Path) -> None:
    path = small_bundle / "fp32" / "stepwise.onnx"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert "stepwise.onnx was changed" in assert_same_error(library, small_bundle)
    assert "cannot be loaded by ONNX Runtime" in assert_same_error(library, small_bundle, verify=False)


def test_a_link_that_leaves_the_bundle(library: CppLibrary, small_bundle: Path) -> None:
    outside = small_bundle.parent / "outside.json"
    shutil.move(small_bundle / "tokenizer.json", outside)
    (small_bundle / "tokenizer.json").symlink_to(outside)
    assert "leaves the bundle" in assert_same_error(library, small_bundle)


def test_a_link_to_itself(library: CppLibrary, small_bundle: Path) -> None:
    (small_bundle / "tokenizer.json").unlink()
    (small_bundle / "tokenizer.json").symlink_to("tokenizer.json")
    found = cpp_error(library, small_bundle)
    assert isinstance(python_error(small_bundle), BundleError)
    assert found is not None
    assert PYTHON_ERRORS[found.code] is BundleError
    assert found.message.startswith("gircse.json has the path 'tokenizer.json', which cannot be one: ")


def test_links_inside_the_bundle_and_to_it_are_followed(library: CppLibrary, small_bundle: Path) -> None:
    shutil.move(small_bundle / "tokenizer.json", small_bundle / "other.json")
    (small_bundle / "tokenizer.json").symlink_to("other.json")
    link = small_bundle.parent / "link"
    link.symlink_to(small_bundle)
    assert cpp_error(library, link) is None


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/passwd"])
def test_external_data_that_leaves_the_bundle(library: CppLibrary, small_bundle: Path, location: str) -> None:
    shutil.copyfile(small_bundle / "fp32" / "weights.bin", small_bundle / "outside.bin")
    point_weights_at(small_bundle / "fp32" / "stepwise.onnx", location)
    rehash(small_bundle)
    assert "External data path" in assert_same_error(library, small_bundle)


@pytest.mark.parametrize("other", ["qwen2", "mistral-window"])
def test_a_graph_of_another_bundle(
    library: CppLibrary, small_models: SmallModels, small_bundle: Path, other: str
) -> None:
    for name in ("fp32/stepwise.onnx", "fp32/weights.bin"):
        shutil.copyfile(small_models.bundle(other, steps=3) / name, small_bundle / name)
    rehash(small_bundle)
    assert "belongs to another bundle: it computes " in assert_same_error(library, small_bundle)


def test_a_graph_that_says_nothing_of_its_bundle(library: CppLibrary, small_bundle: Path) -> None:
    path = small_bundle / "fp32" / "stepwise.onnx"
    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[:]
    onnx.save(model, path)
    rehash(small_bundle)
    assert "it computes None; " in assert_same_error(library, small_bundle)


@pytest.mark.parametrize("layout", [None, "unrolled", "stepwise"])
@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8", "", "x" * 5000, "a\nb"])
def test_precisions_and_layouts_that_a_bundle_lacks(
    library: CppLibrary, small_models: SmallModels, precision: str, layout: str | None
) -> None:
    bundle = small_models.bundle("qwen2", layout="stepwise")
    assert_same_error(library, bundle, precision=precision, layout=layout)


def test_a_variant_with_the_stepwise_graph_alone(library: CppLibrary, small_bundle: Path) -> None:
    add_stepwise_variants(small_bundle, "int8", "fp16")
    assert_same_error(library, small_bundle, precision="int8", layout="unrolled")
    assert_same_error(library, small_bundle, precision="fp16", layout="unrolled")
    with library.open(small_bundle, precision="int8") as subject:
        assert subject.description.layout == b"stepwise"


def test_several_precisions_and_no_default(library: CppLibrary, small_bundle: Path) -> None:
    edit_manifest(small_bundle, lambda m: m["variants"].update(a=m["variants"].pop("fp32")))
    edit_manifest(small_bundle, lambda m: m["variants"].update(b=m["variants"]["a"]))
    assert "has several precisions and no default; it has a, b. Name one." in assert_same_error(library, small_bundle)


def test_bf16_does_not_run_on_the_cpu(library: CppLibrary, small_models: SmallModels) -> None:
    bundle = small_models.bundle("qwen2", precisions=("fp32", "bf16"))
    assert "cannot run" in assert_same_error(library, bundle, precision="bf16")


def test_a_bundle_without_golden_vectors(library: CppLibrary, small_bundle: Path) -> None:
    edit_manifest(small_bundle, lambda m: m.update(golden=False, golden_missing_reason="no memory"))
    assert "has no golden vectors (no memory)" in assert_same_error(library, small_bundle, self_test=True)
    edit_manifest(small_bundle, lambda m: m.update(golden=False, golden_missing_reason=None))
    assert_same_error(library, small_bundle, self_test=True)


GOLDEN = {
    "a list": ("golden.json", b"[]"),
    "no cases": ("golden.json", b'{"cases": []}'),
    "unknown token": ("golden.json", b'{"cases": [{"instruction": "", "text": "a", "token_ids": [520, 700, -1]}]}'),
    "no tokens": ("golden.json", b'{"cases": [{"instruction": "", "text": "a", "token_ids": []}]}'),
    "tokens that are text": ("golden.json", b'{"cases": [{"instruction": "", "text": "a", "token_ids": ["1"]}]}'),
    "fewer texts": ("golden.json", b'{"cases": [{"instruction": "", "text": "a", "token_ids": [1]}]}'),
    "no bytes": ("golden.safetensors", b""),
    "no prompt": ("golden.safetensors", save({"step_embeddings": np.zeros((12, 5, 48))})),
    "no steps": ("golden.safetensors", save({"prompt_embedding": np.zeros((12, 48), np.float32)})),
    "narrow": ("golden.safetensors", save({"prompt_embedding": np.zeros((12, 47), np.float32)})),
    "float64": ("golden.safetensors", save({"prompt_embedding": np.zeros((12, 48))})),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_damaged_golden_vectors(library: CppLibrary, small_bundle: Path, name: str) -> None:
    file, content = GOLDEN[name]
    (small_bundle / file).write_bytes(content)
    rehash(small_bundle)
    if content == b"":  # the words of the safetensors library
        found = cpp_error(library, small_bundle, verify=False, self_test=True)
        assert isinstance(python_error(small_bundle, verify=False, self_test=True), BundleError)
        assert found is not None
        assert "golden.safetensors cannot be read: the header is too small. Copy" in found.message
    else:
        assert_same_error(library, small_bundle, verify=False, self_test=True)


def outcome(work: Callable[[], Any]) -> tuple[Any, GircseError | CppError | None]:
    """Return the result of the work and None, or None and its error."""
    try:
        return work(), None
    except (GircseError, CppError) as err:
        return None, err


def repeats_a_name(content: bytes) -> bool:
    """Tell whether an object of a JSON file, or of the header of a safetensors file, has a name twice."""
    if content[:1] != b"{":
        content = content[8 : 8 + int.from_bytes(content[:8], "little")]
    repeated = False

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal repeated
        repeated |= len(dict(pairs)) < len(pairs)
        return dict(pairs)

    json.loads(content, object_pairs_hook=look)
    return repeated


class BundleUnderTest:
    """A copy of a bundle whose files are replaced."""

    def __init__(self, original: Path, copy: Path, library: CppLibrary) -> None:
        self.original, self.copy, self.library = original, copy, library
        shutil.copytree(original, copy)

    def content(self, name: str) -> bytes:
        return (self.original / name).read_bytes()

    def ours(self, *, self_test: bool = False) -> tuple[Float32, Float32]:
        with self.library.open(self.copy, provider="cpu", threads=1) as subject:
            if self_test:
                subject.self_test()
            return subject.encode(TEXTS), subject.encode(TEXTS, instruction="Find it")

    def theirs(self, *, self_test: bool = False) -> tuple[Float32, Float32]:
        with Embedder(self.copy, provider="cpu", threads=1) as subject:
            if self_test:
                subject.self_test()
            return subject.encode(TEXTS), subject.encode(TEXTS, instruction="Find it")

    def compare(self, name: str, **options: Any) -> None:
        """Check that both runtimes give the same vectors, or errors of the same class.

        Where a name stands twice in an object, the last value counts for both. Python looks at the types of the others
        too, so it may refuse what C++ does not.
        """
        expected, refusal = outcome(lambda: self.theirs(**options))
        found, error = outcome(lambda: self.ours(**options))
        if isinstance(error, CppError):
            assert refusal is not None, str(error)
            assert PYTHON_ERRORS[error.code] is type(refusal), f"{error} / {refusal}"
            assert error.message.isprintable()
            assert len(error.message) < 10_000
        elif refusal is not None:
            assert repeats_a_name((self.copy / name).read_bytes()), str(refusal)
        else:
            np.testing.assert_array_equal(found, expected)


@pytest.fixture(scope="module")
def subject(
    small_models: SmallModels, tmp_path_factory: pytest.TempPathFactory, library: CppLibrary
) -> BundleUnderTest:
    original = small_models.bundle("qwen2", steps=2, layout="stepwise")
    return BundleUnderTest(original, tmp_path_factory.mktemp("fuzz") / "bundle", library)


@pytest.fixture
def _restore(subject: BundleUnderTest) -> None:
    shutil.copytree(subject.original, subject.copy, dirs_exist_ok=True)


@pytest.mark.usefixtures("_restore")
@given(data=st.data())
def test_any_damage_of_a_manifest(subject: BundleUnderTest, data: st.DataObject) -> None:
    (subject.copy / "gircse.json").write_bytes(data.draw(damaged_document(subject.content("gircse.json"))))
    subject.compare("gircse.json")


@pytest.mark.usefixtures("_restore")
@pytest.mark.parametrize(
    ("name", "damages"), [("golden.json", damaged_document), ("golden.safetensors", damaged_safetensors)]
)
@given(data=st.data())
def test_any_damage_of_golden_vectors(
    subject: BundleUnderTest, data: st.DataObject, name: str, damages: Callable[[bytes], st.SearchStrategy[bytes]]
) -> None:
    (subject.copy / name).write_bytes(data.draw(damages(subject.content(name))))
    rehash(subject.copy)
    subject.compare(name, self_test=True)
