"""TensorRT engines of a bundle: ``engines/NAME.plan`` and ``engines/NAME.json``, checked before the plan is trusted.

``gircse-build`` writes both. A plan runs only with the TensorRT that built it, on the compute capabilities that it was
built for, and belongs to exactly one bundle. The JSON holds the fields of :class:`EngineManifest`.
"""

import shlex
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path

from gircse.runtime.bundle import Bundle, file_sha256
from gircse.runtime.errors import BundleError, EngineMismatchError, ProviderError
from gircse.runtime.manifest import Layout
from gircse.runtime.provider import Provider
from gircse.runtime.records import Record, decode_versioned, encode_record

ENGINES_FOLDER = "engines"
ENGINE_SCHEMA_VERSION = 4
OLDEST_ENGINE_SCHEMA_VERSION = 2
"""Version 2 had no ``weight_streaming``, version 3 no ``layer_outputs``."""

Shape = tuple[int, ...]
Sizes = tuple[int, int, int]


class Stage(StrEnum):
    """What a profile is made for: both passes, or the prompt or a step of the stepwise layout."""

    ANY = "any"
    PROMPT = "prompt"
    STEP = "step"


class ShapeRange(Record, frozen=True):
    """The min, opt and max shape of one engine input."""

    min: Shape
    opt: Shape
    max: Shape

    def holds(self, shape: Shape) -> bool:
        """Whether a shape lies in the range."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


class EngineProfile(Record, frozen=True):
    """One optimization profile; its place in ``EngineManifest.profiles`` is its index in the engine.

    Attributes:
        name: such as ``latency`` or ``throughput``.
        stage: what it is made for. Its ranges hold every stage; only the opt shapes differ.
        shapes: the range of every input, by name.
    """

    name: str
    stage: Stage
    shapes: Mapping[str, ShapeRange]


class BuildRequest(Record, frozen=True):
    """The options of ``gircse-build`` as they were given, but for those that :class:`EngineManifest` has itself.

    Attributes:
        batch: min, opt and max texts of a run.
        tokens: min, opt and max tokens of a prompt; None where the bundle's limit was taken.
        profiles: named profiles, as on the command line; empty for the default ones.
        workspace_gib: maximum workspace; None leaves it to TensorRT.
        weight_streaming: weights that the GPU has no room for stay in main memory.
        layer_outputs: the values between the layers are outputs too, and can be replaced; for ``gircse-parity``.
    """

    batch: Sizes
    tokens: Sizes | None = None
    profiles: tuple[str, ...] = ()
    workspace_gib: float | None = None
    weight_streaming: bool = False
    layer_outputs: bool = False


class EngineManifest(Record, frozen=True):
    """What must be known of a plan before it is loaded.

    Attributes:
        schema_version: version of these fields.
        bundle_sha256: SHA-256 of the bundle's ``gircse.json``.
        precision: variant that it was built from.
        layout: graph that it was built from.
        provider: which TensorRT built it.
        version: version of that TensorRT.
        compute_capabilities: GPUs that it runs on, such as ``8.9``.
        profiles: optimization profiles, in the engine's order.
        request: what ``gircse-build`` was asked for.
        settings: settings of TensorRT's builder.
        build_seconds: how long the build took.
        plan_bytes: size of the plan.
        plan_sha256: SHA-256 of the plan.
    """

    schema_version: int
    bundle_sha256: str
    precision: str
    layout: Layout
    provider: Provider
    version: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[EngineProfile, ...]
    request: BuildRequest
    settings: Mapping[str, str | int | float | bool | None]
    build_seconds: float
    plan_bytes: int
    plan_sha256: str

    @property
    def name(self) -> str:
        """File name without suffix: ``fp16-tensorrt-rtx-1.7.1-sm89``; in front, what is not as usual."""
        capabilities = "-".join(capability.replace(".", "") for capability in self.compute_capabilities)
        layout = "unrolled-" if self.layout is Layout.UNROLLED else ""
        layers = "layers-" if self.request.layer_outputs else ""
        return f"{layers}{layout}{self.precision}-{self.provider}-{self.version}-sm{capabilities}"

    def build_command(self, bundle: Path, capability: str) -> str:
        """Return the command that builds it again, for the bundle where it is now and a GPU that may be another one."""
        return build_command(
            bundle,
            precision=self.precision,
            provider=self.provider,
            layout=self.layout,
            capability=capability,
            request=self.request,
        )

    def to_json(self) -> bytes:
        """Return the content of the JSON next to the plan."""
        return encode_record(self, indent=2)


def build_command(
    bundle: Path,
    *,
    precision: str,
    provider: Provider,
    layout: Layout,
    capability: str,
    request: BuildRequest | None = None,
) -> str:
    """Return a ``gircse-build`` command, quoted for a shell; without a request, sizes have their defaults."""
    words = ["gircse-build", str(bundle), "--precision", precision, "--provider", provider, "--layout", layout]
    if request is not None:
        words += ["--batch", ":".join(map(str, request.batch))]
        if request.tokens is not None:
            words += ["--tokens", ":".join(map(str, request.tokens))]
        if request.profiles:
            words += ["--profiles", ",".join(request.profiles)]
        if request.workspace_gib is not None:
            words += ["--workspace-gib", str(request.workspace_gib)]
        if request.weight_streaming:
            words.append("--weight-streaming")
        if request.layer_outputs:
            words.append("--layer-outputs")
    return shlex.join([*words, "--sm", capability])


def read_engines(bundle: Bundle) -> list[tuple[EngineManifest, Path]]:
    """Return the manifests of a bundle's engines and the paths of their plans, sorted by name.

    Raises:
        BundleError: a manifest cannot be read or used.
    """
    remake = f"Build the engine again: {shlex.join(['gircse-build', str(bundle.directory)])}"
    found = []
    for path in sorted((bundle.directory / ENGINES_FOLDER).glob("*.json")):
        try:
            content = path.read_bytes()
        except OSError as err:
            raise BundleError(str(path), f"cannot be read: {err.strerror}", None, remake) from err
        manifest = decode_versioned(
            EngineManifest,
            content,
            where=str(path),
            oldest=OLDEST_ENGINE_SCHEMA_VERSION,
            newest=ENGINE_SCHEMA_VERSION,
            error=BundleError,
            outdated=EngineMismatchError,
            remake=remake,
        )
        found.append((manifest, path.with_suffix(".plan")))
    return found


def select_engine(
    bundle: Bundle,
    *,
    provider: Provider,
    version: str,
    capability: str,
    precisions: Sequence[str],
    layout: Layout | None,
    verify: bool,
    layer_outputs: bool = False,
) -> tuple[EngineManifest, Path]:
    """Select the engine that this machine can run.

    Args:
        bundle: an opened bundle.
        provider: which TensorRT is installed.
        version: its version.
        capability: compute capability of the GPU, such as ``8.9``.
        precisions: variants that may be taken, the best first.
        layout: layout of the engine; None takes stepwise before unrolled.
        verify: compare the SHA-256 of the plan.
        layer_outputs: whether it is one with the values between the layers.

    Raises:
        ProviderError: there is no engine of the provider; the message says how to build one.
        EngineMismatchError: none fits; the message says what differs and how to build one that does.
        BundleError: a plan or its manifest is damaged.
    """
    engines = [
        (manifest, path)
        for manifest, path in read_engines(bundle)
        if manifest.provider is provider and manifest.request.layer_outputs == layer_outputs
    ]
    candidates = [
        (manifest, path)
        for precision in precisions
        for name in ((layout,) if layout else (Layout.STEPWISE, Layout.UNROLLED))
        for manifest, path in engines
        if manifest.precision == precision and manifest.layout is name
    ]
    if not candidates:
        raise _no_engine(bundle, provider, precisions, layout, capability)
    differences = [_differences(manifest, bundle, version, capability) for manifest, _ in candidates]
    for (manifest, path), difference in zip(candidates, differences, strict=True):
        if not difference:
            _check_plan_file(path, manifest, manifest.build_command(bundle.directory, capability), verify=verify)
            return manifest, path
    manifest, path = candidates[0]
    raise EngineMismatchError(
        str(path),
        f"does not fit: {'; '.join(differences[0])}",
        None,
        f"Build it again: {manifest.build_command(bundle.directory, capability)}",
    )


def _no_engine(
    bundle: Bundle, provider: Provider, precisions: Sequence[str], layout: Layout | None, capability: str
) -> ProviderError:
    possible = [name for name in precisions if name in bundle.manifest.variants] or precisions
    layouts = bundle.manifest.graph.layouts  # a variant with one graph of two has the stepwise one
    command = build_command(
        bundle.directory,
        precision=possible[0],
        provider=provider,
        layout=layout or (Layout.STEPWISE if Layout.STEPWISE in layouts else Layout.UNROLLED),
        capability=capability,
    )
    wanted = f"{layout} {provider}" if layout else provider
    return ProviderError(
        str(bundle.directory), f"has no {wanted} engine of {' or '.join(possible)}", None, f"Build one: {command}"
    )


def _differences(manifest: EngineManifest, bundle: Bundle, version: str, capability: str) -> list[str]:
    found = []
    if manifest.bundle_sha256 != bundle.manifest_sha256():
        found.append("it was built from another export of the bundle")
    if manifest.version != version:
        found.append(f"it was built by {manifest.provider} {manifest.version}, and {version} is installed")
    if capability not in manifest.compute_capabilities:
        built_for = ", ".join(manifest.compute_capabilities)
        found.append(f"it was built for compute capability {built_for}, and this GPU has {capability}")
    return found


def _check_plan_file(path: Path, manifest: EngineManifest, command: str, *, verify: bool) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size == manifest.plan_bytes and not (verify and file_sha256(path) != manifest.plan_sha256):
        return
    got = "is missing" if size is None else f"has {size} bytes"
    if size == manifest.plan_bytes:
        got = "has another SHA-256"
    expected = f"it was built with {manifest.plan_bytes} bytes and the SHA-256 {manifest.plan_sha256}"
    raise BundleError(str(path), got, expected, f"Build it again: {command}")
