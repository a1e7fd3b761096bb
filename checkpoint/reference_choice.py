"""Chooses how the PyTorch reference runs: with the whole model in memory where it fits, else one layer at a time."""

import argparse
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from gircse.checkpoint.model_config import read_model_config
from gircse.checkpoint.source import Checkpoint
from gircse.runtime.errors import CheckpointError, OptionError, reason_of
from gircse.runtime.precision import Precision

if TYPE_CHECKING:  # torch takes seconds to import, and --help should not
    from gircse.checkpoint.model_weights import ModelWeights
    from gircse.checkpoint.reference import Reference, WholeReference
    from gircse.checkpoint.streamed_reference import StreamedReference

BASE_BYTES = 5 << 28
"""Memory of torch, transformers and one batch (measured: 0.8 to 1.1 GiB)."""

FREE_SHARE = 0.8
"""Share of the available memory that a reference takes unless told otherwise; the system needs some to cache files."""

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
    checkpoint: Checkpoint, options: ReferenceOptions, *, steps: int, allow_partial_adapter: bool = True
) -> "Reference":
    """Open the reference of a checkpoint, whole or streamed.

    Args:
        checkpoint: model and adapter.
        options: where it runs, in what type, and how much memory it may take.
        steps: K; without steps the checkpoint may lack an lm_head.
        allow_partial_adapter: see ``Adapter.open``.

    Raises:
        CheckpointError: the checkpoint cannot be used, or not even one layer of it fits into the memory.
        OptionError: torch cannot use the device.
    """
    from gircse.checkpoint.model_weights import ModelWeights

    _check_device(options.device)
    config = read_model_config(checkpoint.directory)
    weights = ModelWeights.open(checkpoint, config, steps=steps, allow_partial_adapter=allow_partial_adapter)
    sizes = ReferenceSizes.of(weights, config, options)
    memory = int(psutil.virtual_memory().available * FREE_SHARE) if options.memory is None else options.memory
    on_device = _device_memory(options.device)
    if sizes.whole <= memory and (on_device is None or sizes.whole_on_device <= on_device):
        return _open_whole(checkpoint, options, steps, allow_partial_adapter)
    return _open_streamed(weights, config, options, sizes, memory, on_device)


@dataclass(frozen=True)
class ReferenceSizes:
    """Memory that a reference needs, in bytes.

    Attributes:
        whole: main memory for the whole model, which PyTorch loads in FP32.
        whole_on_device: memory of a GPU for the whole model.
        layer: the largest decoder layer as it computes.
        streamed: least main memory with one layer at a time.
        streamed_on_device: least memory of a GPU with one layer at a time.
    """

    whole: int
    whole_on_device: int
    layer: int
    streamed: int
    streamed_on_device: int

    @classmethod
    def of(cls, weights: "ModelWeights", config: Any, options: ReferenceOptions) -> "ReferenceSizes":
        """Add up the shapes of a checkpoint."""
        item = 4 if options.dtype is Precision.FP32 else 2
        prefixes = [f"model.layers.{index}." for index in range(config.num_hidden_layers)]
        shapes = {name: math.prod(entry.shape) for name, entry in weights.base.entries.items()}
        layer = max(
            (sum(size for name, size in shapes.items() if name.startswith(prefix)) for prefix in prefixes), default=0
        )
        merging = 3 * weights.largest_read_bytes  # a weight, its copy and what PEFT adds to it, in FP32
        held = (2 if options.device == "cpu" else 3) * item * layer  # one computes, the next one is read
        return cls(
            whole=BASE_BYTES + int(1.2 * weights.total_bytes) + 2 * weights.adapter_bytes,
            whole_on_device=BASE_BYTES + weights.total_bytes * item // 4,
            layer=item * layer,
            streamed=BASE_BYTES + held + merging + MIN_GROUP_BYTES,
            streamed_on_device=BASE_BYTES + item * layer + merging + MIN_GROUP_BYTES,
        )


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
    weights: "ModelWeights",
    config: Any,
    options: ReferenceOptions,
    sizes: ReferenceSizes,
    memory: int,
    on_device: int | None,
) -> "StreamedReference":
    from gircse.checkpoint.streamed_model import StreamedModel
    from gircse.checkpoint.streamed_reference import StreamedReference

    for place, needed, there in (("memory", sizes.streamed, memory), ("GPU", sizes.streamed_on_device, on_device)):
        if there is not None and needed > there:
            raise CheckpointError(
                f"the {place} for the PyTorch model",
                f"is {_gib(there)}",
                f"one layer at a time needs {_gib(needed)}",
                "Raise --reference-memory, or use a machine with more.",
            )
    spare = memory - sizes.streamed if on_device is None else on_device - sizes.streamed_on_device
    group = min(MIN_GROUP_BYTES + spare // 2, MAX_GROUP_BYTES)
    resident = min((spare + MIN_GROUP_BYTES - group) // sizes.layer, config.num_hidden_layers)
    stays = f"; {resident} of {config.num_hidden_layers} stay" if resident else ""
    note = (
        f"the PyTorch model needs {_gib(sizes.whole)} of memory, {_gib(memory)} are there for it: its layers are "
        + (f"streamed, one at a time{stays}")
    )
    streamed = StreamedModel(config, weights, device=options.device, precision=options.dtype, resident_layers=resident)
    return StreamedReference(streamed, group_bytes=group, notes=(note,))


def _check_device(device: str) -> None:
    """Refuse a device that torch does not have.

    Raises:
        OptionError: it cannot be used.
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


def _device_memory(device: str) -> int | None:
    """Return the free memory of a GPU in bytes, None for a device that shares main memory."""
    import torch

    if torch.device(device).type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * FREE_SHARE)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
