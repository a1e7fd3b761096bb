"""Chooses how the PyTorch reference runs: with the whole model in memory where it fits, else one layer at a time."""

import argparse
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import psutil

from gircse.checkpoint.available_memory import available_memory
from gircse.checkpoint.model_config import read_model_config
from gircse.checkpoint.source import Checkpoint
from gircse.checkpoint.tensor_naming import EMBEDDING_TABLE
from gircse.runtime.errors import CheckpointError, OptionError, reason_of
from gircse.runtime.precision import Precision

if TYPE_CHECKING:  # torch takes seconds to import, and --help should not
    from gircse.checkpoint.model_weights import ModelWeights
    from gircse.checkpoint.reference import Reference, WholeReference
    from gircse.checkpoint.streamed_reference import StreamedReference

BASE_BYTES = 5 << 28
"""Memory of torch, transformers and one batch (measured: 0.8 to 1.1 GiB)."""

FREE_SHARE = 0.8
"""Share of what there is that a reference takes unless told otherwise; the system needs some memory to cache files."""

MIN_GROUP_BYTES, MAX_GROUP_BYTES = 1 << 28, 4 << 30
"""What the batches that run together may hold; more of it saves sweeps over the layers."""

DTYPES = (Precision.FP32, Precision.FP16, Precision.BF16)


@dataclass(frozen=True)
class ReferenceOptions:
    """How the PyTorch reference runs.

    Attributes:
        device: a torch device, such as ``cpu`` or ``cuda``.
        dtype: type of weights and arithmetic.
        memory: bytes that it may take; None takes what is free.
    """

    device: str = "cpu"
    dtype: Precision = Precision.FP32
    memory: int | None = None


def add_reference_flags(parser: Any, *, dtype: bool = True) -> None:
    """Add ``--device``, ``--dtype`` and ``--reference-memory``; the arguments are called as in ``ReferenceOptions``.

    Args:
        parser: of a command, or a group of its flags.
        dtype: whether there is a choice of type.
    """
    parser.add_argument("--device", default="cpu", help="torch device of the PyTorch model (default: cpu)")
    if dtype:
        parser.add_argument(
            "--dtype",
            type=Precision,
            choices=DTYPES,
            default=Precision.FP32,
            metavar="|".join(DTYPES),
            help="type that the PyTorch model computes in (default: fp32)",
        )
    parser.add_argument(
        "--reference-memory",
        dest="memory",
        type=_memory,
        metavar="auto|GIB",
        help="memory of the PyTorch model; where it does not fit whole, it is streamed layer by layer "
        "(default: auto, what is free)",
    )


def _memory(text: str) -> int | None:
    try:
        size = math.inf if text == "auto" else float(text)
    except ValueError:
        size = math.nan
    if not size > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of GiB above 0")
    return None if size == math.inf else int(size * 2**30)


def open_reference(
    checkpoint: Checkpoint,
    options: ReferenceOptions,
    *,
    steps: int,
    allow_partial_adapter: bool = True,
    budget: "ReferenceBudget | None" = None,
) -> "Reference":
    """Open the reference of a checkpoint, whole or streamed.

    Args:
        checkpoint: model and adapter.
        options: where it runs, in what type, and how much memory it may take.
        steps: K; without steps the checkpoint may lack an lm_head.
        allow_partial_adapter: see ``Adapter.open``.
        budget: what a command has decided on before; None asks what is free now.

    Raises:
        CheckpointError: the checkpoint cannot be used, or not even one layer of it fits into the memory.
        OptionError: torch cannot use the device.
    """
    from gircse.checkpoint.model_weights import ModelWeights

    config = read_model_config(checkpoint.directory)
    weights = ModelWeights.open(checkpoint, config, steps=steps, allow_partial_adapter=allow_partial_adapter)
    budget = budget or ReferenceBudget.of(weights, config, options)
    if (shortage := budget.shortage) is not None:
        raise CheckpointError(
            "the PyTorch model", shortage, None, "Raise --reference-memory, or use a machine with more memory."
        )
    if budget.fits_whole:
        return _open_whole(checkpoint, options, steps, allow_partial_adapter)
    return _open_streamed(weights, config, options, budget)


@dataclass(frozen=True)
class ReferenceBudget:
    """What a reference needs, and what there is for it, in bytes.

    A command asks once and keeps to it: what it does meanwhile takes memory that a reference can have again, so a
    second answer would contradict what was promised, and estimated, by the first.

    Attributes:
        memory: main memory that it may take.
        device: memory of the GPU that it may take; None on a CPU.
        whole: main memory for the whole model, which PyTorch loads in FP32.
        whole_on_device: memory of the GPU for the whole model.
        layer: the largest decoder layer, as it computes.
        vocabulary: embeddings and lm_head, as they compute.
        streamed: least main memory with one layer at a time.
        streamed_on_device: least memory of the GPU with one layer at a time.
    """

    memory: int
    device: int | None
    whole: int
    whole_on_device: int
    layer: int
    vocabulary: int
    streamed: int
    streamed_on_device: int

    @classmethod
    def of(cls, weights: "ModelWeights", config: Any, options: ReferenceOptions, *, variations: bool = False) -> Self:
        """Add up the shapes of a checkpoint, and ask what is free.

        Args:
            weights: of the checkpoint.
            config: of the model.
            options: what the reference may take.
            variations: whether it is to run with other weights in place of its own (``Variation``). The whole model is
                then in memory twice, while the table is rounded with three more copies of that.

        Raises:
            OptionError: torch cannot use the device.
        """
        device = _device_memory(options.device)
        item = 4 if options.dtype is Precision.FP32 else 2
        layer = item * max(_layer_sizes(weights, config.num_hidden_layers), default=0)
        # What PEFT adds to a weight, and that before it is scaled; the weight itself where it is not merged in place.
        merging = (2 if options.dtype is Precision.FP32 else 3) * weights.largest_read_bytes
        group = MIN_GROUP_BYTES
        table = math.prod(weights.base.entries[EMBEDDING_TABLE].shape)
        varied = weights.total_bytes // 4 + 3 * table if variations else 0
        return cls(
            memory=_free_memory() if options.memory is None else options.memory,
            device=device,
            whole=BASE_BYTES + int(1.2 * weights.total_bytes) + 2 * weights.adapter_bytes + 4 * varied,
            whole_on_device=BASE_BYTES + (weights.total_bytes // 4 + varied) * item,
            layer=layer,
            vocabulary=2 * item * table,
            streamed=BASE_BYTES + (layer + group if device is None else 2 * layer) + merging,
            streamed_on_device=BASE_BYTES + layer + merging + group,
        )

    @property
    def fits_whole(self) -> bool:
        """Whether there is memory for the whole model."""
        return self.whole <= self.memory and (self.device is None or self.whole_on_device <= self.device)

    @property
    def shortage(self) -> str | None:
        """Why there can be no reference at all; None if there can."""
        if self.fits_whole:
            return None
        needs = [("memory", self.streamed, self.memory), ("GPU memory", self.streamed_on_device, self.device)]
        for what, needed, there in needs:
            if there is not None and needed > there:
                return f"needs {_gib(needed)} of {what} with one layer at a time, {_gib(there)} are there for it"
        return None

    @property
    def reads_ahead(self) -> bool:
        """Whether a streamed reference reads a layer while another one computes."""
        return self.device is not None or self.memory - self.streamed >= self.layer

    @property
    def spare(self) -> int:
        """What a streamed reference may take on top of the least and of reading ahead, where it computes."""
        if self.device is not None:
            return self.device - self.streamed_on_device
        return self.memory - self.streamed - (self.layer if self.reads_ahead else 0)


def _layer_sizes(weights: "ModelWeights", layers: int) -> list[int]:
    """Return the number of weights in each decoder layer."""
    sizes = [0] * layers
    for name, entry in weights.base.entries.items():
        if name.startswith("model.layers."):
            sizes[int(name.split(".")[2])] += math.prod(entry.shape)
    return sizes


def _open_whole(
    checkpoint: Checkpoint, options: ReferenceOptions, steps: int, allow_partial_adapter: bool
) -> "WholeReference":
    from gircse.checkpoint.reference import WholeReference, load_reference

    model = load_reference(
        checkpoint,
        device=options.device,
        precision=options.dtype,
        steps=steps,
        allow_partial_adapter=allow_partial_adapter,
    )
    return WholeReference(model)


def _open_streamed(
    weights: "ModelWeights", config: Any, options: ReferenceOptions, budget: ReferenceBudget
) -> "StreamedReference":
    from gircse.checkpoint.streamed_model import StreamedModel
    from gircse.checkpoint.streamed_reference import StreamedReference

    layers = config.num_hidden_layers
    more = min(budget.spare // 2, MAX_GROUP_BYTES - MIN_GROUP_BYTES)
    resident = min((budget.spare - more) // budget.layer, layers)
    keep_vocabulary = budget.spare - more - resident * budget.layer >= budget.vocabulary
    note = (
        f"the PyTorch model as a whole needs {_gib(budget.whole)} of memory, {_gib(budget.memory)} are there for it: "
        f"its {layers} layers come one at a time" + (f", {resident} of them stay" if resident else "")
    )
    streamed = StreamedModel(
        config,
        weights,
        device=options.device,
        precision=options.dtype,
        reads_ahead=budget.reads_ahead,
        resident_layers=resident,
        resident_vocabulary=keep_vocabulary,
    )
    return StreamedReference(streamed, group_bytes=MIN_GROUP_BYTES + more, notes=(note,))


def _free_memory() -> int:
    """Return what a process with a reference may take, with what it already holds of ``BASE_BYTES``."""
    held = min(psutil.Process().memory_full_info().uss, BASE_BYTES)
    return int((available_memory() + held) * FREE_SHARE)


def _device_memory(device: str) -> int | None:
    """Return the memory of a GPU that is free for a reference, None for a device without memory of its own.

    Raises:
        OptionError: torch cannot use the device.
    """
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as err:  # what torch raises for a device that is not there
        raise OptionError(
            f"--device {device}",
            f"cannot be used: {reason_of(err)}",
            None,
            "Choose a device of this machine's torch, such as cpu.",
        ) from err
    if torch.device(device).type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * FREE_SHARE)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
