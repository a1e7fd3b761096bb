"""What a parity run is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gircse.checkpoint.reference_choice import ReferenceOptions
from gircse.evaluation.tasks.files import TaskOptions
from gircse.runtime.manifest import Layout
from gircse.runtime.precision import Precision
from gircse.runtime.provider import Provider

TORCH = "torch"


@dataclass(frozen=True)
class ParityOptions:
    """What to compare; the fields are the flags of ``gircse-parity``.

    Attributes:
        bundle: bundle directory.
        precisions: variants to compare; empty means every one that has the layout, except the reference.
        reference: ``torch``, or ``BUNDLE[:PRECISION]``.
        model: where the checkpoint is now, if not where the manifest says.
        adapter: where the adapter is now.
        device: of the PyTorch reference.
        dtype: type that it computes in.
        memory: bytes that it may take; None takes what is free.
        texts: file of texts, or None for the built-in ones.
        instruction: for texts that bring none.
        tasks: tasks that both backends are scored on.
        cross_steps: compute the matrix of query steps against document steps.
        limits: limits that replace the defaults, by the name of the field of ``ParityLimits``.
        layout: graph to compare; None is the one that suits the provider.
        provider: where the compared variants run; a bundle as reference runs on the CPU.
        threads: threads per backend; None leaves it to each.
        locate: find the layers that depart from the reference, on the worst text of each variant.
    """

    bundle: Path
    precisions: Sequence[str] = ()
    reference: str = TORCH
    model: str | None = None
    adapter: str | None = None
    device: str = "cpu"
    dtype: Precision = Precision.FP32
    memory: int | None = None
    texts: Path | None = None
    instruction: str = ""
    tasks: TaskOptions = field(default_factory=TaskOptions)
    cross_steps: bool = False
    limits: Mapping[str, float] = field(default_factory=dict)
    layout: Layout | None = None
    provider: Provider = Provider.CPU
    threads: int | None = None
    locate: bool = False

    @property
    def reference_options(self) -> ReferenceOptions:
        """How the PyTorch reference runs."""
        return ReferenceOptions(self.device, self.dtype, self.memory)
