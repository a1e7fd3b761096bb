"""What an export is asked for: the flags of ``gircse-export`` as one object."""

from dataclasses import dataclass
from pathlib import Path

from gircse.checkpoint.model_settings import ModelSettings
from gircse.checkpoint.reference_choice import ReferenceOptions
from gircse.export.graph.builder import RefinementSettings
from gircse.runtime.errors import OptionError, member_of
from gircse.runtime.manifest import Layout
from gircse.runtime.precision import Precision


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ModelSettings):
    """What to export, and how; the fields are the flags of ``gircse-export``.

    Attributes:
        output: directory of the bundle.
        layout: ``unrolled``, which brings the stepwise graph along, or ``stepwise`` alone.
        precisions: the variants to write.
        calibration: file of ``gircse-calibrate``, for INT8 variants.
        probe_texts: file of texts for the overflow probe of FP16; None takes the golden ones.
        keep_float32: parts of weight names whose matrix products stay in FP32 in every variant.
        query_instruction: what ``Embedder.encode_query`` puts before a text unless told otherwise.
        max_shard_bytes: no file of weights may be larger; None for one file a precision.
        force: replace an existing bundle.
        device: where PyTorch computes the golden vectors.
        memory: bytes that PyTorch may take for that; None takes what is free.
    """

    output: Path
    layout: Layout = Layout.UNROLLED
    precisions: tuple[Precision, ...] = (Precision.FP32,)
    keep_float32: tuple[str, ...] = ()
    calibration: Path | None = None
    probe_texts: Path | None = None
    query_instruction: str = ""
    max_shard_bytes: int | None = None
    force: bool = False
    device: str = "cpu"
    memory: int | None = None

    def __post_init__(self) -> None:
        """Take plain strings for the enums, and refuse what cannot be exported.

        Raises:
            OptionError: a value is out of its range.
        """
        super().__post_init__()
        object.__setattr__(self, "layout", member_of(Layout, "--layout", self.layout))
        precisions = dict.fromkeys(member_of(Precision, "--precision", name) for name in self.precisions)
        object.__setattr__(self, "precisions", tuple(precisions))
        _check_instruction(self.query_instruction)

    @property
    def reference(self) -> ReferenceOptions:
        """How PyTorch runs; golden vectors are those of FP32."""
        return ReferenceOptions(device=self.device, memory=self.memory)

    @property
    def settings(self) -> RefinementSettings:
        """The part that the graphs compute."""
        return RefinementSettings(self.steps, self.pooling, self.temperature)


def _check_instruction(instruction: str) -> None:
    """Refuse a query instruction that UTF-8 cannot hold: half of a surrogate pair, from a mangled command line.

    Raises:
        OptionError: it cannot.
    """
    try:
        instruction.encode("utf-8")
    except UnicodeEncodeError as err:
        raise OptionError(
            "--query-instruction",
            f"has a character that UTF-8 cannot hold: {err.object[err.start]!r} at {err.start}",
            None,
            "Check the encoding of the terminal or the script.",
        ) from err
