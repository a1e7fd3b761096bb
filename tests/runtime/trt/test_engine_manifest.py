"""Which engine of a bundle is selected, and what is said where none can be."""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.small_models import SmallModels

from gircse.runtime.bundle import Bundle, file_sha256
from gircse.runtime.errors import BundleError, EngineMismatchError, GircseError, ProviderError
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider
from gircse.runtime.trt.engine_manifest import (
    ENGINE_SCHEMA_VERSION,
    BuildRequest,
    EngineManifest,
    EngineProfile,
    ShapeRange,
    Stage,
    read_engines,
    select_engine,
)

VERSION = "11.1.0"
PREFERRED = ("fp16", "bf16", "fp32")
SHAPES = {"input_ids": ShapeRange((1, 1), (8, 64), (64, 512))}


@pytest.fixture
def bundle(small_models: SmallModels, tmp_path: Path) -> Bundle:
    """A copy whose path has a space and an apostrophe."""
    copy = tmp_path / "the user's bundle"
    shutil.copytree(small_models.bundle("llama", precisions=("fp32", "fp16", "bf16")), copy)
    return Bundle.open(copy)


def add_engine(bundle: Bundle, *, content: bytes = b"a plan", **changes: Any) -> Path:
    """Put a plan and its manifest into a bundle, as gircse-build does; return the plan's path."""
    fields: dict[str, Any] = {
        "schema_version": ENGINE_SCHEMA_VERSION,
        "bundle_sha256": file_sha256(bundle.directory / "gircse.json"),
        "precision": "fp16",
        "layout": Layout.STEPWISE,
        "provider": Provider.TENSORRT,
        "version": VERSION,
        "compute_capabilities": ("8.9",),
        "profiles": (EngineProfile("throughput", Stage.ANY, SHAPES),),
        "request": BuildRequest((1, 2, 3)),
        "settings": {"strongly_typed": True},
        "build_seconds": 1.5,
        "plan_bytes": len(content),
        "plan_sha256": hashlib.sha256(content).hexdigest(),
        **changes,
    }
    manifest = EngineManifest(**fields)
    folder = bundle.directory / "engines"
    folder.mkdir(exist_ok=True)
    (folder / f"{manifest.name}.json").write_bytes(manifest.to_json())
    path = folder / f"{manifest.name}.plan"
    path.write_bytes(content)
    return path


def select(
    bundle: Bundle,
    *,
    provider: Provider = Provider.TENSORRT,
    version: str = VERSION,
    capability: str = "8.9",
    precisions: Sequence[str] = PREFERRED,
    layout: Layout | None = None,
    verify: bool = True,
    layer_outputs: bool = False,
) -> str:
    """Return the name of the selected engine."""
    manifest, path = select_engine(
        bundle,
        provider=provider,
        version=version,
        capability=capability,
        precisions=precisions,
        layout=layout,
        verify=verify,
        layer_outputs=layer_outputs,
    )
    assert path == bundle.directory / "engines" / f"{manifest.name}.plan"
    return manifest.name


def command_after(label: str, error: GircseError) -> list[str]:
    """Return what a shell makes of the command that ends a message."""
    hint = error.hint or ""
    assert hint.startswith(f"{label}: ")
    return shlex.split(hint.removeprefix(f"{label}: "))


def test_json_survives_a_round_trip(bundle: Bundle) -> None:
    path = add_engine(bundle)
    ((manifest, found),) = read_engines(bundle)
    assert found == path
    assert msgspec.json.decode(manifest.to_json(), type=EngineManifest) == manifest
    assert manifest.profiles[0].shapes["input_ids"].max == (64, 512)
    assert path.name == "fp16-tensorrt-11.1.0-sm89.plan"


def test_every_engine_has_its_own_name(bundle: Bundle) -> None:
    add_engine(bundle)
    changes: list[dict[str, Any]] = [
        {"layout": Layout.UNROLLED},
        {"precision": "bf16"},
        {"provider": Provider.TENSORRT_RTX},
        {"version": "10.15.1"},
        {"compute_capabilities": ("8.9", "12.0")},
    ]
    for change in changes:
        add_engine(bundle, **change)
    found = read_engines(bundle)
    names = {manifest.name for manifest, _ in found}
    assert len(names) == 6
    assert all(path.stem == manifest.name for manifest, path in found)
    assert {"unrolled-fp16-tensorrt-11.1.0-sm89", "fp16-tensorrt-11.1.0-sm89-120"} < names


def test_shape_range() -> None:
    found = ShapeRange((1, 0, 6), (2, 3, 6), (4, 9, 6))
    assert all(found.holds(shape) for shape in (found.min, found.opt, found.max, (4, 0, 6)))
    for shape in ((0, 3, 6), (5, 3, 6), (2, 10, 6), (2, 3, 5), (2, 3), (2, 3, 6, 1)):
        assert not found.holds(shape)


def test_precision_comes_before_layout(bundle: Bundle) -> None:
    for precision in ("fp32", "bf16"):
        for layout in Layout:
            add_engine(bundle, precision=precision, layout=layout)
    assert select(bundle) == "bf16-tensorrt-11.1.0-sm89"
    assert select(bundle, precisions=("fp32",)) == "fp32-tensorrt-11.1.0-sm89"
    assert select(bundle, layout=Layout.UNROLLED) == "unrolled-bf16-tensorrt-11.1.0-sm89"
    assert select(bundle, precisions=("fp32", "bf16"), layout=Layout.STEPWISE) == "fp32-tensorrt-11.1.0-sm89"
    add_engine(bundle, layout=Layout.UNROLLED)
    assert select(bundle) == "unrolled-fp16-tensorrt-11.1.0-sm89"  # any layout of the best precision
    add_engine(bundle)
    assert select(bundle) == "fp16-tensorrt-11.1.0-sm89"


def test_an_engine_that_does_not_fit_is_skipped(bundle: Bundle) -> None:
    add_engine(bundle, version="10.15.1")
    add_engine(bundle, compute_capabilities=("9.0", "12.0"))
    assert select(bundle, capability="12.0") == "fp16-tensorrt-11.1.0-sm90-120"
    assert select(bundle, version="10.15.1") == "fp16-tensorrt-10.15.1-sm89"
    add_engine(bundle, precision="fp32")
    assert select(bundle) == "fp32-tensorrt-11.1.0-sm89"


def test_each_provider_has_its_own_engines(bundle: Bundle) -> None:
    add_engine(bundle)
    with pytest.raises(ProviderError, match=r"has no tensorrt-rtx engine of fp16 or bf16 or fp32\. Build one: "):
        select(bundle, provider=Provider.TENSORRT_RTX)
    add_engine(bundle, provider=Provider.TENSORRT_RTX)
    assert select(bundle, provider=Provider.TENSORRT_RTX) == "fp16-tensorrt-rtx-11.1.0-sm89"
    assert select(bundle) == "fp16-tensorrt-11.1.0-sm89"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": "10.15.1"}, r"built by tensorrt 10\.15\.1, and 11\.1\.0 is installed"),
        ({"compute_capabilities": ("8.6", "12.0")}, r"for compute capability 8\.6, 12\.0, and this GPU has 8\.9"),
        ({"bundle_sha256": "0" * 64}, "built from another export of the bundle"),
        ({"version": "9", "bundle_sha256": ""}, "another export of the bundle; it was built by tensorrt 9, and 11.1.0"),
    ],
)
def test_differences_are_named_with_the_command_that_fixes_them(
    bundle: Bundle, change: dict[str, Any], match: str
) -> None:
    path = add_engine(bundle, **change)
    with pytest.raises(EngineMismatchError, match=match) as caught:
        select(bundle)
    assert str(caught.value).startswith(f"{path} does not fit: it was built ")
    command = ["gircse-build", str(bundle.directory), "--precision", "fp16", "--provider", "tensorrt"]
    command += ["--layout", "stepwise", "--batch", "1:2:3", "--sm", "8.9"]
    assert command_after("Build it again", caught.value) == command


def test_the_best_of_several_is_blamed(bundle: Bundle) -> None:
    add_engine(bundle, precision="fp32", version="9.0")
    path = add_engine(bundle, precision="bf16", compute_capabilities=("7.5",))
    with pytest.raises(
        ProviderError, match=rf"{re.escape(str(path))} does not fit: it was built for compute capability 7\.5"
    ) as caught:
        select(bundle)
    assert "9.0" not in str(caught.value)


def test_an_export_after_the_build_makes_the_engine_stale(bundle: Bundle) -> None:
    add_engine(bundle)
    assert select(bundle)
    manifest = bundle.directory / "gircse.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    with pytest.raises(ProviderError, match="built from another export of the bundle"):
        select(Bundle.open(bundle.directory))


@pytest.mark.parametrize(
    ("precisions", "layout", "flags"),
    [
        (PREFERRED, None, ["--precision", "fp16", "--provider", "tensorrt", "--layout", "stepwise"]),
        (("fp32",), None, ["--precision", "fp32", "--provider", "tensorrt", "--layout", "stepwise"]),
        (("int8", "bf16"), None, ["--precision", "bf16", "--provider", "tensorrt", "--layout", "stepwise"]),
        (PREFERRED, Layout.UNROLLED, ["--precision", "fp16", "--provider", "tensorrt", "--layout", "unrolled"]),
    ],
)
def test_no_engine_names_the_command_that_builds_it(
    bundle: Bundle, precisions: tuple[str, ...], layout: Layout | None, flags: list[str]
) -> None:
    possible = " or ".join(name for name in precisions if name in bundle.manifest.variants)
    with pytest.raises(ProviderError, match=rf"has no .*tensorrt engine of {possible}\. ") as caught:
        select(bundle, precisions=precisions, layout=layout)
    assert command_after("Build one", caught.value) == ["gircse-build", str(bundle.directory), *flags, "--sm", "8.9"]


def test_an_engine_of_the_other_layout_does_not_count(bundle: Bundle) -> None:
    """The command must build the layout that was asked for, or the same error would come again."""
    add_engine(bundle)
    with pytest.raises(ProviderError, match="has no unrolled tensorrt engine") as caught:
        select(bundle, layout=Layout.UNROLLED)
    assert "--layout unrolled" in str(caught.value)


def test_a_bundle_without_a_stepwise_graph(small_models: SmallModels) -> None:
    """K = 0 has the unrolled graph alone, and gircse-build's default layout is stepwise."""
    bundle = Bundle.open(small_models.bundle("llama", steps=0))
    with pytest.raises(ProviderError, match=r"--precision fp32 --provider tensorrt --layout unrolled --sm 8\.9$"):
        select(bundle)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("damage", "got"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "has 0 bytes"),
        (lambda path: path.write_bytes(b"a pla"), "has 5 bytes"),
        (lambda path: path.write_bytes(b"a plan, and more"), "has 16 bytes"),
        (lambda path: (path.unlink(), path.mkdir()), "is missing"),
    ],
)
def test_missing_and_truncated_plans(
    bundle: Bundle, damage: Callable[[Path], object], got: str, *, verify: bool
) -> None:
    path = add_engine(bundle)
    damage(path)
    digest = hashlib.sha256(b"a plan").hexdigest()
    with pytest.raises(
        BundleError, match=rf"\.plan {got}; it was built with 6 bytes and the SHA-256 {digest}\. "
    ) as caught:
        select(bundle, verify=verify)
    assert command_after("Build it again", caught.value)[:2] == ["gircse-build", str(bundle.directory)]


def test_a_changed_plan(bundle: Bundle) -> None:
    add_engine(bundle).write_bytes(b"b plan")
    with pytest.raises(BundleError, match=r"\.plan has another SHA-256; it was built with 6 bytes and the SHA-256 "):
        select(bundle)
    assert select(bundle, verify=False)  # the user's own choice


def test_a_damaged_plan_is_not_skipped(bundle: Bundle) -> None:
    add_engine(bundle).write_bytes(b"b plan")
    add_engine(bundle, precision="fp32")
    with pytest.raises(BundleError, match="fp16-tensorrt"):
        select(bundle)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.with_suffix(".json").read_text())
    change(content)
    path.with_suffix(".json").write_text(json.dumps(content))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"schema_version": 2}'])
def test_unreadable_json(bundle: Bundle, content: bytes) -> None:
    path = add_engine(bundle).with_suffix(".json")
    path.write_bytes(content)
    with pytest.raises(
        BundleError, match=rf"^{re.escape(str(path))} cannot be read: .*\. Build the engine again: gircse-build '"
    ):
        select(bundle)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: p.update(more=1), "unknown field `more`"),
        (lambda p: p.update(plan_bytes="6"), r"Expected `int`, got `str` - at `\$\.plan_bytes`"),
        (lambda p: p.update(layout="rolled"), "Invalid enum value 'rolled'"),
        (lambda p: p.update(provider="gpu"), "Invalid enum value 'gpu'"),
        (lambda p: p["profiles"][0].update(stage="late"), "Invalid enum value 'late'"),
        (lambda p: p["profiles"][0]["shapes"]["input_ids"].pop("opt"), "missing required field `opt`"),
        (lambda p: p["request"].update(batch=[1, 8]), r"length 3 - at `\$\.request\.batch`"),
        (lambda p: p["request"].update(command="rm"), "unknown field `command`"),
        (lambda p: p.update(schema_version=5), r"schema version 5; this gircse-deploy reads up to 4\. Upgrade: "),
        (lambda p: p.update(schema_version=5, more=1), r"schema version 5; this gircse-deploy reads up to 4\. "),
    ],
)
def test_json_of_another_form(bundle: Bundle, change: Callable[[dict[str, Any]], object], match: str) -> None:
    edit_json(add_engine(bundle), change)
    with pytest.raises(BundleError, match=match):
        select(bundle)


def test_json_of_version_2_is_read(bundle: Bundle) -> None:
    edit_json(add_engine(bundle), lambda p: (p.update(schema_version=2), p["request"].pop("weight_streaming")))
    ((manifest, _),) = read_engines(bundle)
    assert not manifest.request.weight_streaming
    assert select(bundle)


def test_json_of_an_older_version(bundle: Bundle) -> None:
    """As an engine of another TensorRT: it has to be built again, and ``auto`` goes past it with a warning."""
    edit_json(add_engine(bundle), lambda p: p.update(schema_version=1))
    match = r"schema version 1; this gircse-deploy reads 2 to 4\. Build the engine again: gircse-build "
    with pytest.raises(EngineMismatchError, match=match):
        select(bundle)


def test_json_that_is_not_a_file(bundle: Bundle) -> None:
    (bundle.directory / "engines" / "odd.json").mkdir(parents=True)
    with pytest.raises(BundleError, match=r"odd\.json cannot be read: .*[Dd]irectory"):
        select(bundle)


def test_a_plan_without_json_is_not_an_engine(bundle: Bundle) -> None:
    add_engine(bundle).with_suffix(".json").unlink()
    assert read_engines(bundle) == []


REQUESTS = [
    (BuildRequest((1, 8, 64)), ["--batch", "1:8:64"]),
    (
        BuildRequest((1, 1, 4), tokens=(1, 16, 48), profiles=("a=1", "b=1:8x4"), workspace_gib=1.5),
        ["--batch", "1:1:4", "--tokens", "1:16:48", "--profiles", "a=1,b=1:8x4", "--workspace-gib", "1.5"],
    ),
    (BuildRequest((1, 8, 64), weight_streaming=True), ["--batch", "1:8:64", "--weight-streaming"]),
    (BuildRequest((1, 8, 64), layer_outputs=True), ["--batch", "1:8:64", "--layer-outputs"]),
]


def test_an_engine_that_shows_its_layers_is_taken_only_when_asked_for(bundle: Bundle) -> None:
    layers = add_engine(bundle, request=BuildRequest((1, 2, 3), layer_outputs=True))
    assert layers.name == "layers-fp16-tensorrt-11.1.0-sm89.plan"
    with pytest.raises(ProviderError, match="has no tensorrt engine of"):
        select(bundle)
    assert select(bundle, layer_outputs=True) == layers.stem
    plain = add_engine(bundle)
    assert select(bundle) == plain.stem
    assert select(bundle, layer_outputs=True) == layers.stem


@pytest.mark.parametrize(("request_", "flags"), REQUESTS)
@pytest.mark.parametrize("moved", ["/plain", "/with space", "/it's", "/back\\1slash", "/$(rm -rf .)"])
def test_build_command(bundle: Bundle, moved: str, request_: BuildRequest, flags: list[str]) -> None:
    """For the bundle where it is now and the GPU that is there."""
    add_engine(bundle, request=request_, compute_capabilities=("8.9", "12.0"))
    ((manifest, _),) = read_engines(bundle)
    words = ["--precision", "fp16", "--provider", "tensorrt", "--layout", "stepwise", *flags, "--sm", "12.0"]
    assert shlex.split(manifest.build_command(Path(moved), "12.0")) == ["gircse-build", moved, *words]


def test_build_command_quotes_what_a_json_smuggles_in(bundle: Bundle) -> None:
    add_engine(bundle, request=BuildRequest((1, 2, 3), profiles=("a=1; rm -rf $HOME", "`id`")))
    ((manifest, _),) = read_engines(bundle)
    assert "--profiles 'a=1; rm -rf $HOME,`id`' --sm" in manifest.build_command(Path("/b"), "8.9")
