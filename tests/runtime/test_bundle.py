"""What is checked before a bundle is trusted; each damage gives one clear error."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.small_models import SmallModels, add_stepwise_variants, edit_manifest, point_weights_at

from gircse.runtime import BundleError, Embedder
from gircse.runtime.bundle import Bundle, file_sha256
from gircse.runtime.manifest import FileEntry, Layout, Manifest
from gircse.runtime.precision import SPECS, Precision
from gircse.runtime.provider import Provider


def accept_file(bundle: Path, name: str) -> None:
    """Make the manifest agree with a changed file, as an attacker would."""
    path = bundle / name
    entry = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    edit_manifest(bundle, lambda manifest: manifest["files"].update({name: entry}))


def test_manifest_survives_a_round_trip(small_models: SmallModels) -> None:
    manifest = Bundle.open(small_models.bundle("qwen2")).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.graph.steps == 5
    assert manifest.model.name == "qwen2"  # and not the path, which says where the export ran
    files = {path for path in small_models.bundle("qwen2").rglob("*") if path.is_file()}
    assert {small_models.bundle("qwen2") / name for name in manifest.files} == files - {
        small_models.bundle("qwen2") / "gircse.json"
    }


def test_no_bundle_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle; it has no gircse\.json\. Make one: gircse-export .*"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(schema_version=4), r"has schema version 4; .* reads up to 3\. Upgrade: pip install"),
        (lambda m: m.update(schema_version=4, something_new=[1]), r"schema version 4; .* Upgrade"),
        (lambda m: m.update(schema_version=0), r"has schema version 0; .* reads 1 to 3\. Export the bundle again\."),
        (lambda m: m.pop("schema_version"), r"schema_version"),
        (lambda m: m.pop("graph"), r"missing required field `graph`"),
        (lambda m: m.update(extra=1), r"unknown field `extra`"),
        (lambda m: m["graph"].update(steps="8"), r"Expected `int`, got `str` - at `\$\.graph\.steps`"),
        (lambda m: m["graph"].update(steps=65), r"steps=65.*; there are 0 to 64 steps"),
        (lambda m: m["graph"].update(temperature=0.0), r"temperature=0\.0.* the temperature is above 0"),
        (lambda m: m["graph"].update(pooling="max"), r"Invalid enum value 'max'"),
        (
            lambda m: m["graph"].update(layout="stepwise"),
            r"the graphs stepwise, unrolled; layout stepwise has stepwise\.",
        ),
        (
            lambda m: m["variants"]["fp32"]["graphs"].pop("stepwise"),
            r"fp32 the graphs unrolled; layout unrolled has stepwise, unrolled",
        ),
        (
            lambda m: m["variants"]["fp32"]["graphs"].clear(),
            r"variant fp32 the graphs none; layout unrolled has stepwise, ",
        ),
        (lambda m: m["files"].pop("fp32/weights.bin"), r"no entry for fp32/weights\.bin"),
        (lambda m: m["files"].pop("tokenizer.json"), r"no entry for tokenizer\.json"),
        (lambda m: m.update(variants={}), r"has no variants; a bundle has one or more"),
        (lambda m: m.update(pad_token_id=520), r"has the padding token 520; the tokens of the model are 0 to 519\."),
        (lambda m: m.update(pad_token_id=-1), r"has the padding token -1; "),
        (
            lambda m: m["files"].update({"x\0y": m["files"]["golden.json"]}),
            r"'x\\x00y', which cannot be one: embedded null",
        ),
        (lambda m: m["files"].update({"x" * 300: m["files"]["golden.json"]}), r"cannot be read: File name too long"),
        (lambda m: m.update({"a\nb": 1}), r"unknown field `a b`\. Export"),
        (lambda m: m.update({"x" * 70_000: 1}), r"unknown field `x{900,1000} \[\.\.\.\] x{900,1000}`"),
        (
            lambda m: m.update(prompt_template="no place"),
            r"prompt template 'no place'; a template holds \{text\} exactly once",
        ),
    ],
)
def test_bad_manifests(small_bundle: Path, change: Callable[[dict[str, Any]], None], match: str) -> None:
    edit_manifest(small_bundle, change)
    with pytest.raises(BundleError, match=match):
        Bundle.open(small_bundle)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_manifest_that_is_no_json_object(small_bundle: Path, content: bytes) -> None:
    (small_bundle / "gircse.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"gircse\.json"):
        Bundle.open(small_bundle)


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/hostname", "fp32/../../outside.bin"])
def test_manifest_path_that_leaves_the_bundle(small_bundle: Path, name: str) -> None:
    outside = small_bundle.parent / "outside.bin"
    outside.write_bytes(b"secret")
    edit_manifest(small_bundle, lambda m: m["files"].update({name: {"bytes": 6, "sha256": file_sha256(outside)}}))
    with pytest.raises(BundleError, match="leaves the bundle"):
        Bundle.open(small_bundle)


def test_link_that_leaves_the_bundle(small_bundle: Path) -> None:
    outside = small_bundle.parent / "outside.json"
    shutil.move(small_bundle / "tokenizer.json", outside)
    (small_bundle / "tokenizer.json").symlink_to(outside)
    with pytest.raises(BundleError, match="leaves the bundle"):
        Bundle.open(small_bundle)


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/passwd"])
def test_external_data_that_leaves_the_bundle(small_bundle: Path, location: str) -> None:
    """A graph whose weights point elsewhere is refused even if every hash agrees."""
    weights = small_bundle / "fp32" / "weights.bin"
    shutil.copyfile(weights, small_bundle / "outside.bin")
    point_weights_at(small_bundle / "fp32" / "stepwise.onnx", location)
    accept_file(small_bundle, "fp32/stepwise.onnx")
    with pytest.raises(BundleError, match=r"stepwise\.onnx cannot be loaded by ONNX Runtime: .*External data path"):
        Embedder(small_bundle)


@pytest.mark.parametrize("name", ["fp32/weights.bin", "fp32/stepwise.onnx", "tokenizer.json", "golden.safetensors"])
def test_flipped_bit(small_bundle: Path, name: str) -> None:
    path = small_bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        BundleError, match=rf"{name} was changed or damaged: its SHA-256 is \w{{64}}; the manifest says \w{{64}}\. Copy"
    ):
        Bundle.open(small_bundle).verify("fp32")


def test_flipped_bit_stops_the_embedder(small_bundle: Path) -> None:
    path = small_bundle / "fp32" / "weights.bin"
    data = bytearray(path.read_bytes())
    data[4242] ^= 16
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.bin was changed .* SHA-256"):
        Embedder(small_bundle)
    Embedder(small_bundle, verify=False)  # the user's own choice


def test_damaged_graph_is_blamed_on_the_hash(small_bundle: Path) -> None:
    path = small_bundle / "fp32" / "stepwise.onnx"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(BundleError, match=r"stepwise\.onnx was changed .* SHA-256"):
        Embedder(small_bundle)


@pytest.mark.parametrize("name", ["fp32/weights.bin", "golden.json"])
def test_truncated_and_missing_files(small_bundle: Path, name: str) -> None:
    path = small_bundle / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(BundleError, match=rf"{name} has {len(data) - 1} bytes; the manifest says {len(data)} bytes"):
        Bundle.open(small_bundle)
    path.unlink()
    with pytest.raises(BundleError, match=rf"{name} is missing; the manifest says {len(data)} bytes"):
        Bundle.open(small_bundle)


def test_graph_of_another_bundle(small_models: SmallModels, small_bundle: Path) -> None:
    other = small_models.bundle("qwen2", steps=3)
    for name in ("fp32/stepwise.onnx", "fp32/weights.bin"):
        shutil.copyfile(other / name, small_bundle / name)
        accept_file(small_bundle, name)
    with pytest.raises(BundleError, match="belongs to another bundle"):
        Embedder(small_bundle)


def test_graph_of_another_architecture(small_models: SmallModels, small_bundle: Path) -> None:
    other = small_models.bundle("mistral-window")
    for name in ("fp32/stepwise.onnx", "fp32/weights.bin"):
        shutil.copyfile(other / name, small_bundle / name)
        accept_file(small_bundle, name)
    with pytest.raises(BundleError, match=r'it computes .*"mistral".*; the manifest describes .*"qwen2"'):
        Embedder(small_bundle)


def test_unknown_precision(small_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"has no precision 'int8'; it has fp32\."):
        Embedder(small_bundle, precision="int8")


@pytest.mark.parametrize("precision", [precision for precision, spec in SPECS.items() if spec.calibrated])
def test_variant_with_the_stepwise_graph_alone(small_bundle: Path, precision: Precision) -> None:
    """INT8 has no unrolled graph, also where other variants have one."""
    add_stepwise_variants(small_bundle, precision)
    bundle = Bundle.open(small_bundle)
    assert Manifest.from_json(bundle.manifest.to_json()) == bundle.manifest
    assert bundle.manifest.graph.layout is Layout.UNROLLED
    for provider in Provider:
        assert bundle.layout(precision, provider) is Layout.STEPWISE
        for name in ("fp32", precision):
            for layout in Layout:
                assert bundle.layout(name, provider, layout) is layout  # what was asked for is never replaced
    assert bundle.graph(precision, Layout.STEPWISE) == small_bundle / "fp32" / "stepwise.onnx"
    match = rf"bundle, {precision}, has no unrolled graph; it has stepwise\. .* or take another precision\.$"
    with pytest.raises(BundleError, match=match):
        bundle.graph(precision, Layout.UNROLLED)
    with pytest.raises(BundleError, match=rf"has no precision 'fp4'; it has fp32, {precision}"):
        bundle.layout("fp4", Provider.CPU)


@pytest.mark.parametrize(
    ("provider", "layout"),
    [
        (Provider.CPU, Layout.STEPWISE),
        (Provider.CUDA, Layout.UNROLLED),
        (Provider.ORT_TENSORRT, Layout.UNROLLED),
        (Provider.TENSORRT, Layout.STEPWISE),
        (Provider.TENSORRT_RTX, Layout.STEPWISE),
    ],
)
def test_the_provider_decides_where_there_are_two_graphs(
    small_bundle: Path, provider: Provider, layout: Layout
) -> None:
    assert Bundle.open(small_bundle).layout("fp32", provider) is layout


def test_without_steps_every_variant_has_the_one_graph(small_models: SmallModels) -> None:
    bundle = Bundle.open(small_models.bundle("qwen2", steps=0))
    assert set(bundle.manifest.variants["fp32"].graphs) == {Layout.UNROLLED}
    assert {bundle.layout("fp32", provider) for provider in Provider} == {Layout.UNROLLED}
    with pytest.raises(
        BundleError, match=r"has no stepwise graph; it has unrolled\. .* export again with --layout stepwise\."
    ):
        bundle.graph("fp32", Layout.STEPWISE)


def test_file_entry_is_immutable() -> None:
    with pytest.raises(AttributeError):
        FileEntry(1, "a").bytes = 2  # type: ignore[misc]
