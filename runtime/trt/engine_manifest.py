"""TensorRT engines of a bundle: ``engines/NAME.plan`` with a JSON beside each, checked before the plan is trusted.

``gircse-build`` writes both; a plan runs only with the TensorRT that built it, on the compute capabilities it was built
for, and belongs to exactly one bundle. The JSON holds the fields of :class:`EngineManifest`.
"""

import shlex
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path

from gircse.runtime.bundle import Bundle, file_sha256
from gircse.runtime.errors import BundleError, EngineMismatchError, ProviderError
from gircse.runtime.manifest import MANIFEST_NAME, Layout
from gircse.runtime.provider import Provider
from gircse.runtime.records import Record, decode_versioned, encode_record

ENGINES_FOLDER = "engines"
ENGINE_SCHEMA_VERSION = 2

Shape = tuple[int, ...]


class Stage(StrEnum):
    """What a profile is made for: both passes, or the prompt or a step of the stepwise layout."""

    ANY = "any"
    PROMPT = "prompt"
    STEP = "step"


class ShapeRange(Record, frozen=True):
    """Smallest, expected and largest shape of one engine input."""

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
        stage: what it is made for. Its ranges hold every stage; only the expected shapes differ.
        shapes: the range of every input, by name.
    """

    name: str
    stage: Stage
    shapes: Mapping[str, ShapeRange]


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
        settings: builder settings, as they were given.
        command: the command that builds it again.
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
    settings: Mapping[str, str | int | float | bool | None]
    command: str
    build_seconds: float
    plan_bytes: int
    plan_sha256: str

    def __post_init__(self) -> None:
        """Refuse a command that cannot be taken apart; msgspec turns the ``ValueError`` into its own."""
        if len(shlex.split(self.command)) < 2:
            raise ValueError(f"command {self.command!r} names no bundle")

    @property
    def name(self) -> str:
        """File name without suffix: ``fp16-tensorrt-rtx-1.7.1-sm89``, an unrolled engine with its layout in front."""
        capabilities = "-".join(capability.replace(".", "") for capability in self.compute_capabilities)
        layout = "unrolled-" if self.layout is Layout.UNROLLED else ""
        return f"{layout}{self.precision}-{self.provider}-{self.version}-sm{capabilities}"

    def to_json(self) -> bytes:
        """Return the content of the JSON beside the plan."""
        return encode_record(self, indent=2)


def read_engines(bundle: Bundle) -> list[tuple[EngineManifest, Path]]:
    """Return the plans of a bundle with their paths, sorted by name.

    Raises:
        BundleError: a JSON beside a plan cannot be used.
    """
    found = []
    for path in sorted((bundle.directory / ENGINES_FOLDER).glob("*.json")):
        try:
            content = path.read_bytes()
        except OSError as err:
            raise BundleError(
                f"{path}: {err.strerror} | what gircse-build wrote beside its plan | build the engine again"
            ) from err
        plan = decode_versioned(
            EngineManifest,
            content,
            where=str(path),
            oldest=ENGINE_SCHEMA_VERSION,
            newest=ENGINE_SCHEMA_VERSION,
            error=BundleError,
            remake="Build the engine again.",
        )
        found.append((plan, path.with_suffix(".plan")))
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
) -> tuple[EngineManifest, Path]:
    """Choose the engine that this machine can run.

    Args:
        bundle: an opened bundle.
        provider: which TensorRT is installed.
        version: its version.
        capability: compute capability of the GPU, such as ``8.9``.
        precisions: variants that may be taken, the best first.
        layout: layout of the engine; None takes stepwise before unrolled.
        verify: compare the SHA-256 of the plan.

    Raises:
        ProviderError: there is no engine of the provider; the message says how to build one.
        EngineMismatchError: none fits; the message says what differs and how to build one that does.
        BundleError: a plan or its JSON is damaged.
    """
    plans = [(plan, path) for plan, path in read_engines(bundle) if plan.provider is provider]
    wanted = [
        (plan, path)
        for precision in precisions
        for name in ((layout,) if layout else (Layout.STEPWISE, Layout.UNROLLED))
        for plan, path in plans
        if plan.precision == precision and plan.layout is name
    ]
    if not wanted:
        possible = [name for name in precisions if name in bundle.manifest.variants] or precisions
        layouts = bundle.manifest.graph.layouts  # a variant with one graph of two has the stepwise one
        layout = layout or (Layout.STEPWISE if Layout.STEPWISE in layouts else Layout.UNROLLED)
        command = ["gircse-build", str(bundle.directory), "--precision", possible[0], "--provider", provider]
        raise ProviderError(
            f"{bundle.directory}: no {provider} engine of {' or '.join(possible)} | one in {ENGINES_FOLDER}/ | "
            f"build it: {shlex.join([*command, '--layout', layout, '--sm', capability])}"
        )
    differences = [_differences(plan, bundle, version, capability) for plan, _ in wanted]
    for (plan, path), difference in zip(wanted, differences, strict=True):
        if not difference:
            _check_plan_file(plan, path, rebuild_command(plan, bundle.directory, capability), verify=verify)
            return plan, path
    plan, path = wanted[0]
    raise EngineMismatchError(
        f"{path}: {'; '.join(differences[0])} | an engine of this bundle for this machine | "
        f"rebuild: {rebuild_command(plan, bundle.directory, capability)}"
    )


def rebuild_command(plan: EngineManifest, bundle: Path, capability: str) -> str:
    """Return the command that builds a plan again, for a bundle that may have moved and a GPU that may be another."""
    command, _, *flags = shlex.split(plan.command)
    if "--sm" in flags:
        place = flags.index("--sm") + 1
        flags[place : place + 1] = [capability]
    return shlex.join([command, str(bundle), *flags])


def _differences(plan: EngineManifest, bundle: Bundle, version: str, capability: str) -> list[str]:
    found = []
    if plan.schema_version != ENGINE_SCHEMA_VERSION:
        found.append(f"schema version {plan.schema_version}, this gircse-deploy reads {ENGINE_SCHEMA_VERSION}")
    if plan.bundle_sha256 != file_sha256(bundle.directory / MANIFEST_NAME):
        found.append("built from another export of the bundle")
    if plan.version != version:
        found.append(f"built by {plan.provider} {plan.version}, {version} is installed")
    if capability not in plan.compute_capabilities:
        found.append(f"for compute capability {', '.join(plan.compute_capabilities)}, this GPU has {capability}")
    return found


def _check_plan_file(plan: EngineManifest, path: Path, command: str, *, verify: bool) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != plan.plan_bytes or (verify and file_sha256(path) != plan.plan_sha256):
        came = "missing" if size is None else f"{size} bytes" if size != plan.plan_bytes else "another SHA-256"
        raise BundleError(
            f"{path}: {came} | {plan.plan_bytes} bytes, SHA-256 {plan.plan_sha256[:12]}... | build again: {command}"
        )
