"""The manifest of a bundle: ``gircse.json`` holds the fields of :class:`Manifest`."""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Self

import msgspec

from gircse.runtime.errors import BundleError
from gircse.runtime.records import Record, decode_versioned, encode_record

MANIFEST_NAME = "gircse.json"
SCHEMA_VERSION = 3
OLDEST_SCHEMA_VERSION = 1
"""Version 1 had no ``query_instruction`` and no graph of its own for TensorRT, version 2 no ``tokenizer``, no
``prompt_suffix``, no ``truncation_side``, no ``more_weights`` and no ``checked``; all have defaults."""
MAX_STEPS = 64


class Layout(StrEnum):
    """How the K steps are laid out: all in one graph, or in a graph that is run once for the prompt and once a step."""

    UNROLLED = "unrolled"
    STEPWISE = "stepwise"


class Pooling(StrEnum):
    """What becomes of h_1..h_K: their mean (``generate_mean`` in the paper's code) or h_K."""

    MEAN = "mean"
    LAST = "last"


class TokenizerKind(StrEnum):
    """Which token ids are those of a checkpoint.

    ``json``: those of its tokenizer.json and of the tokens and flags that its other tokenizer files add, as
    transformers 4 read them. ``auto``: those of ``AutoTokenizer`` in the transformers that exports, which may rebuild
    the tokenizer.
    """

    JSON = "json"
    AUTO = "auto"


class TruncationSide(StrEnum):
    """The side on which a prompt that is too long is cut."""

    RIGHT = "right"
    LEFT = "left"


class ModelSource(Record, frozen=True):
    """Where the backbone came from.

    Attributes:
        name: ``demo``, a Hugging Face id or a local directory, as it was resolved.
        revision: commit of a Hugging Face snapshot, else None.
        config_sha256: SHA-256 of config.json.
    """

    name: str
    revision: str | None
    config_sha256: str


class AdapterSource(Record, frozen=True):
    """Where the LoRA adapter came from; ``sha256`` is that of adapter_model.safetensors."""

    name: str
    revision: str | None
    sha256: str


class FileEntry(Record, frozen=True):
    """Size and SHA-256 of one file of the bundle."""

    bytes: int
    sha256: str


class GraphFacts(Record, frozen=True):
    """What the graphs compute; every graph repeats it in its ONNX metadata (``identity``).

    Attributes:
        architecture: ``model_type`` of the config, such as ``qwen2``.
        layout: what was exported. An ``unrolled`` bundle holds the stepwise graph too; ``Bundle.layout`` chooses.
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
                MANIFEST_NAME,
                f"has values that no export writes: {self}",
                f"there are 0 to {MAX_STEPS} steps, sizes are at least 1, and the temperature is above 0",
                "Export the bundle again.",
            )

    @property
    def layouts(self) -> set[Layout]:
        """The graphs of a variant; where there are two, an INT8 variant has the stepwise graph alone."""
        return {Layout.STEPWISE, self.layout} if self.steps else {self.layout}

    @property
    def identity(self) -> str:
        """The facts as one line of JSON."""
        return msgspec.json.encode(self).decode()


class TensorSpec(Record, frozen=True):
    """Name, element type and shape of a graph input or output; a word in the shape is a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]


class GraphFile(Record, frozen=True):
    """One ONNX graph: path in the bundle, inputs and outputs."""

    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Variant(Record, frozen=True):
    """One precision of the bundle.

    Attributes:
        graphs: its graphs by layout.
        weights: the file of their weights, or the first of several.
        more_weights: the others, where no file may be larger than a store allows (``gircse-export --max-shard-gib``).
        float32: what stays in FP32 in an FP16 or BF16 variant, in words.
        rewrites: how often each rewrite to this precision applied, by layout and name.
        tensorrt: the graph that TensorRT engines are built from, where it is not the one that ONNX Runtime runs.
        checked: layout to how many golden texts gave PyTorch's vectors on the CPU before the bundle was published.
    """

    graphs: Mapping[Layout, GraphFile]
    weights: str
    float32: tuple[str, ...] = ()
    rewrites: Mapping[Layout, Mapping[str, int]] = msgspec.field(default_factory=dict)
    tensorrt: GraphFile | None = None
    more_weights: tuple[str, ...] = ()
    checked: Mapping[Layout, int] = msgspec.field(default_factory=dict)

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Paths of its weights."""
        return (self.weights, *self.more_weights)

    @property
    def files(self) -> set[str]:
        """Paths of its graphs and weights."""
        graphs = [*self.graphs.values(), *([self.tensorrt] if self.tensorrt else [])]
        return {*self.weight_files, *(graph.path for graph in graphs)}


class Manifest(Record, frozen=True):
    """Everything a runtime must know of a bundle; the fields of ``gircse.json``.

    Attributes:
        schema_version: version of these fields.
        model: where the backbone came from.
        adapter: where the LoRA adapter came from, or None.
        graph: what the graphs compute.
        prompt_template: how an instruction and a text become the prompt; without instruction, the text is the prompt.
        pad_token_id: fills padding, and stands for an empty prompt.
        variants: precision name to its files.
        golden: whether golden.json and golden.safetensors are there.
        golden_missing_reason: why not, when they are not.
        tools: versions of the packages that made the bundle.
        files: every file but the manifest, path to size and hash.
        query_instruction: what ``Embedder.encode_query`` puts before a text unless told otherwise; empty for nothing.
        tokenizer: which token ids tokenizer.json gives.
        prompt_suffix: what is appended to every prompt, before it is tokenized: an end-of-sequence token, or nothing.
        truncation_side: the side on which a prompt of more than ``max_tokens`` is cut.
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
    query_instruction: str = ""
    tokenizer: TokenizerKind = TokenizerKind.JSON
    prompt_suffix: str = ""
    truncation_side: TruncationSide = TruncationSide.RIGHT

    def __post_init__(self) -> None:
        """Refuse a manifest whose parts do not belong together."""
        if not self.variants:
            raise BundleError(MANIFEST_NAME, "has no variants", "a bundle has one or more", "Export the bundle again.")
        if not 0 <= self.pad_token_id < self.graph.vocab_size:
            raise BundleError(
                MANIFEST_NAME,
                f"has the padding token {self.pad_token_id}",
                f"the tokens of the model are 0 to {self.graph.vocab_size - 1}",
                "Export the bundle again.",
            )
        required = {"tokenizer.json"} | ({"golden.json", "golden.safetensors"} if self.golden else set())
        for precision, variant in self.variants.items():
            graphs, layouts = set(variant.graphs), self.graph.layouts
            if not graphs <= layouts or (graphs != layouts and Layout.STEPWISE not in graphs):
                raise BundleError(
                    MANIFEST_NAME,
                    f"gives variant {precision} the graphs {listed(graphs) or 'none'}",
                    f"layout {self.graph.layout} has {listed(layouts)}",
                    "Export the bundle again.",
                )
            required |= variant.files
        if missing := sorted(required - set(self.files)):
            raise BundleError(
                MANIFEST_NAME,
                f"has no entry for {missing[0]}",
                "every file is listed under 'files' with its hash",
                "Export the bundle again.",
            )
        if self.prompt_template.count("{text}") != 1:
            raise BundleError(
                MANIFEST_NAME,
                f"has the prompt template {self.prompt_template!r}",
                "a template holds {text} exactly once",
                "Export the bundle again.",
            )

    def weight_bytes(self, precision: str) -> int:
        """Return the size of the weights of a variant."""
        return sum(self.files[path].bytes for path in self.variants[precision].weight_files)

    def with_checked(self, checked: Mapping[str, Mapping[Layout, int]]) -> Self:
        """Return the manifest with what was checked of each variant, by precision."""
        variants = {
            name: msgspec.structs.replace(variant, checked=checked.get(name, {}))
            for name, variant in self.variants.items()
        }
        return msgspec.structs.replace(self, variants=variants)

    def to_json(self) -> bytes:
        """Return the manifest as the content of ``gircse.json``."""
        return encode_record(self, indent=2)

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Read the content of ``gircse.json``.

        Raises:
            BundleError: not JSON, from a newer schema, or with missing, unknown or ill-typed fields.
        """
        return decode_versioned(
            cls,
            content,
            where=MANIFEST_NAME,
            oldest=OLDEST_SCHEMA_VERSION,
            newest=SCHEMA_VERSION,
            error=BundleError,
            remake="Export the bundle again.",
        )


def listed(names: Iterable[str]) -> str:
    """Return names as one text, for messages."""
    return ", ".join(sorted(names))
