"""The bundle on disk: its manifest, its hashes, and the checks that run before anything in it is trusted.

``gircse.json`` holds the fields of :class:`Manifest`. ``files`` lists every other file of the bundle with its size
and SHA-256, so a bundle is whole exactly when every listed file is there with that hash.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

import msgspec

from gircse.runtime.errors import BundleError

MANIFEST_NAME = "gircse.json"
SCHEMA_VERSION = 1
MAX_STEPS = 64
HASH_BLOCK_BYTES = 1 << 20


class Layout(StrEnum):
    """How the K steps are laid out: all in one graph, or in a graph that is run once for the prompt and once a step."""

    UNROLLED = "unrolled"
    STEPWISE = "stepwise"


class Precision(StrEnum):
    """Type of weights and matrix products; the name of a variant.

    ``int8`` multiplies integers, with scales of activations from a calibration; ``int8-weights`` computes in FP32 on
    8-bit weights.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT8_WEIGHTS = "int8-weights"


INT8_PRECISIONS = (Precision.INT8, Precision.INT8_WEIGHTS)
"""Their variants have no unrolled graph beside the stepwise one: it would hold K + 1 packed copies of every weight."""


class Pooling(StrEnum):
    """What becomes of h_1..h_K: their mean (``generate_mean`` in the paper's code) or h_K."""

    MEAN = "mean"
    LAST = "last"


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what the manifest is made of: typed, immutable, and with no field that the schema lacks."""


class ModelSource(_Record, frozen=True):
    """Where the backbone came from.

    Attributes:
        name: ``demo``, a Hugging Face id or a local directory, as it was resolved.
        revision: commit of a Hugging Face snapshot, else None.
        config_sha256: SHA-256 of config.json.
    """

    name: str
    revision: str | None
    config_sha256: str


class AdapterSource(_Record, frozen=True):
    """Where the LoRA adapter came from; ``sha256`` is that of adapter_model.safetensors."""

    name: str
    revision: str | None
    sha256: str


class FileEntry(_Record, frozen=True):
    """Size and SHA-256 of one file of the bundle."""

    bytes: int
    sha256: str


class GraphFacts(_Record, frozen=True):
    """What the graphs compute; every graph repeats it in its ONNX metadata (``identity``).

    Attributes:
        architecture: ``model_type`` of the config, such as ``qwen2``.
        layout: the layout that ONNX Runtime runs by default, where a variant has it (see ``Bundle.layout``). An
            ``unrolled`` bundle holds the stepwise graph too.
        steps: K. The unrolled graph always runs K steps; the stepwise one runs up to K.
        pooling: ``mean`` or ``last``.
        temperature: divisor of the logits before the softmax over the vocabulary.
        max_tokens: longest prompt in tokens, the instruction included.
        hidden_size: length of a vector.
        num_layers: decoder layers.
        kv_size: width of the keys, and of the values, of one token in one layer.
        vocab_size: rows of the embedding table.
    """

    architecture: str
    layout: Layout
    steps: int
    pooling: Pooling
    temperature: float
    max_tokens: int
    hidden_size: int
    num_layers: int
    kv_size: int
    vocab_size: int

    def __post_init__(self) -> None:
        """Refuse values that no export writes."""
        sizes = (self.max_tokens, self.hidden_size, self.num_layers, self.kv_size, self.vocab_size)
        if not 0 <= self.steps <= MAX_STEPS or min(sizes) < 1 or not self.temperature > 0:
            raise BundleError(
                f"{MANIFEST_NAME}: {self} | 0..{MAX_STEPS} steps, sizes of at least 1, a temperature above 0 | "
                "export the bundle again"
            )

    @property
    def layouts(self) -> set[Layout]:
        """The graphs of a variant; where there are two, one of INT8 has the stepwise graph alone."""
        return {Layout.STEPWISE, self.layout} if self.steps else {self.layout}

    @property
    def identity(self) -> str:
        """The facts as one line of JSON."""
        return msgspec.json.encode(self).decode()


class TensorSpec(_Record, frozen=True):
    """Name, element type and shape of a graph input or output; a word in the shape is a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]


class GraphFile(_Record, frozen=True):
    """One ONNX graph: path in the bundle, inputs and outputs."""

    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Variant(_Record, frozen=True):
    """One precision of the bundle.

    Attributes:
        graphs: its graphs by layout.
        weights: the file of their weights.
        float32: what stays in FP32 in a FP16 or BF16 variant, in words.
        rewrites: how often each rewrite to this precision applied, by layout and name.
    """

    graphs: Mapping[Layout, GraphFile]
    weights: str
    float32: tuple[str, ...] = ()
    rewrites: Mapping[Layout, Mapping[str, int]] = msgspec.field(default_factory=dict)

    @property
    def files(self) -> set[str]:
        """Paths of its graphs and weights."""
        return {self.weights, *(graph.path for graph in self.graphs.values())}


class Manifest(_Record, frozen=True):
    """Everything a runtime must know of a bundle; the fields of ``gircse.json``.

    Attributes:
        schema_version: version of these fields.
        model: where the backbone came from.
        adapter: where the LoRA adapter came from, or None.
        graph: what the graphs compute.
        prompt_template: how an instruction and a text become the prompt; a text without instruction stands alone.
        pad_token_id: fills padding, and stands for an empty prompt.
        variants: precision name to its files.
        golden: whether golden.json and golden.safetensors are there.
        golden_missing_reason: why not, when they are not.
        tools: versions of the packages that made the bundle.
        files: every file but the manifest, path to size and hash.
    """

    schema_version: int
    model: ModelSource
    adapter: AdapterSource | None
    graph: GraphFacts
    prompt_template: str
    pad_token_id: int
    variants: Mapping[str, Variant]
    golden: bool
    golden_missing_reason: str | None
    tools: Mapping[str, str]
    files: Mapping[str, FileEntry]

    def __post_init__(self) -> None:
        """Refuse a manifest whose parts do not belong together."""
        required = {"tokenizer.json"} | ({"golden.json", "golden.safetensors"} if self.golden else set())
        for precision, variant in self.variants.items():
            graphs, layouts = set(variant.graphs), self.graph.layouts
            if not graphs <= layouts or (graphs != layouts and Layout.STEPWISE not in graphs):
                raise BundleError(
                    f"{MANIFEST_NAME}: variant {precision} has {_listed(graphs)} | layout "
                    f"{self.graph.layout} has {_listed(layouts)} | export the bundle again"
                )
            required |= variant.files
        if missing := sorted(required - set(self.files)):
            raise BundleError(
                f"{MANIFEST_NAME}: no entry for {missing[0]} | every file stands under 'files' with its hash | "
                "export the bundle again"
            )
        if self.prompt_template.count("{text}") != 1:
            raise BundleError(
                f"{MANIFEST_NAME}: prompt_template {self.prompt_template!r} | {{text}} exactly once | "
                "export the bundle again"
            )

    def to_json(self) -> bytes:
        """Return the manifest as the content of ``gircse.json``."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Read the content of ``gircse.json``.

        Raises:
            BundleError: no JSON, from a newer schema, or with missing, unknown or ill-typed fields.
        """
        try:
            version = msgspec.json.decode(content, type=SchemaVersion).schema_version
            if version > SCHEMA_VERSION:
                raise BundleError(
                    f"{MANIFEST_NAME}: schema version {version} | this gircse-deploy reads up to {SCHEMA_VERSION} | "
                    "upgrade: pip install -U gircse-deploy"
                )
            return msgspec.json.decode(content, type=cls)
        except msgspec.DecodeError as err:
            raise BundleError(f"{MANIFEST_NAME}: {err} | the manifest of a bundle | export the bundle again") from err


class SchemaVersion(msgspec.Struct):
    """The one field that every version of the manifest, and of the JSON beside an engine, has."""

    schema_version: int


@dataclass(frozen=True)
class Bundle:
    """A bundle directory whose manifest has been read and whose files are all there with the right size.

    Attributes:
        directory: the bundle's folder, resolved.
        manifest: its manifest.
    """

    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a bundle without reading the big files.

        Raises:
            BundleError: no bundle there, a manifest that cannot be used, a path that leaves the bundle, a missing file
                or one of another size.
        """
        directory = Path(path)
        manifest_path = directory / MANIFEST_NAME
        if not manifest_path.is_file():
            raise BundleError(
                f"{directory}: no {MANIFEST_NAME} | a bundle directory | make one: gircse-export --steps 8 "
                f"--output {directory}"
            )
        try:
            content = manifest_path.read_bytes()
        except OSError as err:
            raise BundleError(f"{manifest_path}: {err.strerror} | a readable file | check its permissions") from err
        bundle = cls(directory.resolve(), Manifest.from_json(content))
        for relative, entry in bundle.manifest.files.items():
            bundle._check_size(relative, entry)
        return bundle

    def file(self, relative: str) -> Path:
        """Return the path of a file of the bundle.

        Raises:
            BundleError: the path is absolute or leads out of the bundle, by ``..`` or by a link.
        """
        path = (self.directory / relative).resolve()
        if Path(relative).is_absolute() or not path.is_relative_to(self.directory):
            raise BundleError(
                f"{MANIFEST_NAME}: path {relative!r} leaves the bundle | paths inside {self.directory} | "
                "do not use this bundle; export it again"
            )
        return path

    def variant(self, precision: str) -> Variant:
        """Return the files of a precision.

        Raises:
            BundleError: the bundle does not have it.
        """
        variants = self.manifest.variants
        if precision not in variants:
            raise BundleError(
                f"{self.directory}: precision {precision!r} | it has {_listed(variants)} | name one of these"
            )
        return variants[precision]

    def default_precision(self, preferred: Sequence[str]) -> str:
        """Return the precision to take when none is named: the first preferred one, or the only one there is.

        Raises:
            BundleError: the bundle has several, and none of those preferred.
        """
        variants = self.manifest.variants
        found = next((precision for precision in preferred if precision in variants), None)
        if found is None and len(variants) > 1:
            raise BundleError(f"{self.directory}: no precision named | one of {_listed(variants)} | name one of these")
        return found or next(iter(variants))

    def layout(self, precision: str, wanted: Layout | None = None) -> Layout:
        """Return the layout to run: the one that is wanted; else the bundle's default; else, without it, stepwise.

        Raises:
            BundleError: the bundle does not have the precision.
        """
        if wanted is not None:
            return wanted
        default = self.manifest.graph.layout
        return default if default in self.variant(precision).graphs else Layout.STEPWISE

    def graph(self, precision: str, layout: Layout) -> Path:
        """Return the path of a variant's graph.

        Raises:
            BundleError: the bundle does not have the precision, or not in that layout.
        """
        graphs = self.variant(precision).graphs
        if layout not in graphs:
            other = "another precision" if precision in INT8_PRECISIONS else f"export again with --layout {layout}"
            raise BundleError(
                f"{self.directory}, {precision}: layout {layout} | it has {_listed(graphs)} | name one of these, or "
                f"{other}"
            )
        return self.file(graphs[layout].path)

    def verify(self, precision: str | None) -> None:
        """Read every file but those of other variants and compare its SHA-256 with the manifest.

        Args:
            precision: the variant to include, or None for none.

        Raises:
            BundleError: a file has changed since the export.
        """
        others = {
            name for other, variant in self.manifest.variants.items() if other != precision for name in variant.files
        }
        for relative, entry in self.manifest.files.items():
            if relative in others:
                continue
            digest = file_sha256(self.file(relative))
            if digest != entry.sha256:
                raise BundleError(
                    f"{self.directory / relative}: SHA-256 {digest} | the manifest says {entry.sha256} | "
                    "the file was changed or damaged: copy or export the bundle again"
                )

    def _check_size(self, relative: str, entry: FileEntry) -> None:
        path = self.file(relative)
        size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            came = "missing" if size is None else f"{size} bytes"
            raise BundleError(
                f"{self.directory / relative}: {came} | {entry.bytes} bytes | copy or export the bundle again"
            )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read block by block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
