"""What an export is asked for: the flags of ``gircse-export`` as one object."""

from dataclasses import dataclass
from pathlib import Path

from gircse.export.graph.compose import RefinementSettings
from gircse.runtime.bundle import Layout, Pooling, Precision


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how; the fields are the flags of ``gircse-export``.

    Attributes:
        output: directory of the bundle.
        steps: K, 0 to 64.
        model: ``demo``, a local directory or a Hugging Face id.
        adapter: directory or Hugging Face id of a LoRA, ``none``, or None for the model's default.
        revision: revision of a Hugging Face model.
        pooling: ``mean`` or ``last``.
        temperature: divisor of the logits.
        max_tokens: longest prompt.
        layout: ``unrolled``, which brings the stepwise graph along, or ``stepwise`` alone.
        precisions: the variants to write.
        calibration: file of ``gircse-calibrate``, for INT8 variants.
        probe_texts: file of texts for the overflow probe of FP16; None takes the golden ones.
        keep_float32: parts of weight names whose matrix products stay in FP32 in every variant.
        force: replace an existing bundle.
    """

    output: Path
    steps: int
    model: str = "demo"
    adapter: str | None = None
    revision: str | None = None
    pooling: Pooling = Pooling.MEAN
    temperature: float = 1.0
    max_tokens: int = 512
    layout: Layout = Layout.UNROLLED
    precisions: tuple[Precision, ...] = (Precision.FP32,)
    keep_float32: tuple[str, ...] = ()
    calibration: Path | None = None
    probe_texts: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Take plain strings for the enums; a ``ValueError`` names what they may be."""
        object.__setattr__(self, "pooling", Pooling(self.pooling))
        object.__setattr__(self, "layout", Layout(self.layout))
        object.__setattr__(self, "precisions", tuple(dict.fromkeys(map(Precision, self.precisions))))

    @property
    def settings(self) -> RefinementSettings:
        """The part that the graphs compute."""
        return RefinementSettings(self.steps, self.pooling, self.temperature)
