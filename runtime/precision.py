"""Every precision that a variant of a bundle can have, one row each: adding one is a row here and its graph code.

The limits were measured on the demo with K = 8.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from gircse.runtime.errors import BundleError
from gircse.runtime.provider import Provider


class Precision(StrEnum):
    """Type of weights and matrix products; the name of a variant.

    ``int8`` multiplies integers, with scales of activations from a calibration; ``int8-weights`` and ``int4-weights``
    compute in float on weights of 8 or 4 bits. ``fp8`` multiplies 8-bit floating-point numbers (E4M3) on GPUs that have
    instructions for it.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT8_WEIGHTS = "int8-weights"
    INT4_WEIGHTS = "int4-weights"
    FP8 = "fp8"


@dataclass(frozen=True)
class ParityLimits:
    """What ``gircse-parity`` asks of a variant, against PyTorch in FP32.

    Attributes:
        min_cosine: smallest cosine of a text's vector to the reference's, over every text and step.
        min_rank_correlation: smallest Spearman correlation of pairwise similarities, over every step.
        min_overlap: smallest mean share of common ten nearest neighbors, over every step.
        max_task_drop: largest loss of score on a task, with all K steps.
        max_batch_difference: largest difference of an element between a text alone and in a batch, and between one
            after a prefix that was run once and one that was run whole.
    """

    min_cosine: float
    min_rank_correlation: float
    min_overlap: float
    max_task_drop: float
    max_batch_difference: float


@dataclass(frozen=True)
class PrecisionSpec:
    """What the toolkit knows of one precision.

    Attributes:
        dtype: type of float weights and of the KV cache, under the name that numpy, torch and ONNX share.
        calibrated: made from a calibration. Such a variant has the stepwise graph alone: an unrolled one would hold
            K + 1 packed copies of every weight.
        cpu: ONNX Runtime's CPU provider has kernels for it.
        cuda: ONNX Runtime's GPU providers run its graphs.
        onnxruntime: oldest release of ONNX Runtime whose CPU provider gives the right vectors.
        emulated: on the CPU, ``gircse-parity`` rounds every value to ``dtype`` itself, as a GPU would; ONNX Runtime
            computes in FP32 there and would hide what a GPU does.
        tensorrt: engines can be built from it.
        gpu_rank: place among the variants of a bundle, the best first, where a GPU runs it and none is named. INT8
            costs accuracy, so it comes last, and first of its kinds the one that multiplies integers.
        integer_products: its graphs multiply 8-bit integers.
        float32: what stays in FP32, in words, for the manifest.
        self_test_min_cosine: smallest cosine to the golden vectors that passes. It detects damage; how good a precision
            is, ``limits`` say.
        limits: what it has to keep.
        copied: what a session of the CPU provider holds as copies of the weights, in bytes per byte of them: packed for
            its products, FP16 and BF16 as FP32 (measured on the demo, as is the next).
        tables: what it computes with besides, in embedding tables in FP32.
        engine_graph: TensorRT engines are built from a graph of its own, not from the one that ONNX Runtime runs.
        min_capability: lowest compute capability of a GPU that runs its engines, major and minor.
    """

    dtype: str
    calibrated: bool
    cpu: bool
    cuda: bool
    onnxruntime: str
    emulated: bool
    tensorrt: bool
    gpu_rank: int
    integer_products: bool
    float32: tuple[str, ...]
    self_test_min_cosine: float
    limits: ParityLimits
    copied: float
    tables: float
    engine_graph: bool = False
    min_capability: tuple[int, int] = (0, 0)


_HALF_ISLANDS = (
    "residual stream",
    "RMSNorm",
    "softmax over the vocabulary",
    "attention bias",
    "pooling",
    "L2 normalization",
)
_INT8_FLOAT = ("attention", "SwiGLU", "RMSNorm", "residual stream", "softmax over the vocabulary", "largest channels")

SPECS: Mapping[Precision, PrecisionSpec] = {
    Precision.FP32: PrecisionSpec(
        dtype="float32",
        calibrated=False,
        cpu=True,
        cuda=True,
        onnxruntime="1.24.4",
        emulated=False,
        tensorrt=True,
        gpu_rank=2,
        integer_products=False,
        float32=(),
        self_test_min_cosine=0.9999,  # measured worst 0.9999975: bare demo, pooling last, K = 8
        limits=ParityLimits(0.9999, 0.9999, 0.99, 0.001, 1e-3),
        copied=1.0,
        tables=1.0,
    ),
    Precision.FP16: PrecisionSpec(
        dtype="float16",
        calibrated=False,
        cpu=True,
        cuda=True,
        onnxruntime="1.30.0",  # 1.24 gives NaN, 1.29 other vectors
        emulated=True,
        tensorrt=True,
        gpu_rank=0,
        integer_products=False,
        float32=_HALF_ISLANDS,
        self_test_min_cosine=0.999,
        limits=ParityLimits(0.9995, 0.999, 0.98, 0.002, 5e-3),
        copied=2.7,  # an unrolled graph of the demo: 1.06 GiB in all
        tables=1.5,
    ),
    Precision.BF16: PrecisionSpec(
        dtype="bfloat16",
        calibrated=False,
        cpu=False,
        cuda=True,
        onnxruntime="1.24.4",
        emulated=True,
        tensorrt=True,
        gpu_rank=1,
        integer_products=False,
        float32=(*_HALF_ISLANDS, "SwiGLU"),
        self_test_min_cosine=0.999,
        # Batch difference on an H200: 5.9e-3, and 7.5e-3 in PyTorch's own BF16.
        limits=ParityLimits(0.9995, 0.999, 0.98, 0.002, 1e-2),
        copied=2.7,
        tables=1.5,
    ),
    Precision.INT8: PrecisionSpec(
        dtype="float32",
        calibrated=True,
        cpu=True,
        cuda=False,  # the CUDA provider of 1.31 splits no empty tensor: the prompt pass fails
        onnxruntime="1.32.0",  # older ones fail on empty tensors, or end the process
        emulated=False,
        tensorrt=True,
        gpu_rank=3,
        integer_products=True,
        float32=_INT8_FLOAT,
        self_test_min_cosine=0.97,  # measured 0.988
        # Another batch shape changes the last bit of FP32 sums, which flips roundings to 8 bits: batch difference 0.017
        # to 0.033. A scale taken over the batch (ONNX Runtime's quantize_dynamic) has 0.127.
        limits=ParityLimits(0.98, 0.99, 0.93, 0.004, 5e-2),
        copied=1.0,
        tables=0.1,
        engine_graph=True,
    ),
    Precision.INT8_WEIGHTS: PrecisionSpec(
        dtype="float32",
        calibrated=True,
        cpu=True,
        cuda=False,  # not yet tried
        onnxruntime="1.32.0",
        emulated=False,
        tensorrt=True,
        gpu_rank=5,
        integer_products=False,
        float32=_INT8_FLOAT,
        self_test_min_cosine=0.995,  # measured 0.9966
        limits=ParityLimits(0.995, 0.9995, 0.98, 0.002, 1e-3),
        copied=4.0,  # each in FP32; of a 7B, too, which has less in its embedding table than the demo
        tables=0.0,
        engine_graph=True,
    ),
    Precision.INT4_WEIGHTS: PrecisionSpec(
        dtype="float32",
        calibrated=True,
        cpu=True,
        cuda=False,  # not yet tried
        onnxruntime="1.32.0",
        emulated=False,
        tensorrt=True,
        gpu_rank=6,
        integer_products=False,
        float32=_INT8_FLOAT,
        self_test_min_cosine=0.9,  # measured 0.961
        limits=ParityLimits(0.9, 0.97, 0.85, 0.01, 1e-3),
        copied=5.6,  # each in FP32; of a 7B, which has more in 4 bits than the demo (3.9)
        tables=0.0,
        engine_graph=True,
    ),
    Precision.FP8: PrecisionSpec(
        dtype="float16",
        calibrated=True,
        cpu=True,  # as an emulation, by which it is judged
        cuda=False,  # not tried
        onnxruntime="1.32.0",  # like all variants of a calibration
        emulated=True,
        tensorrt=True,
        gpu_rank=4,
        integer_products=False,
        float32=(*_HALF_ISLANDS, "SwiGLU"),
        self_test_min_cosine=0.985,  # measured 0.9937
        # In the emulation; the drop on a task is that of int8.
        limits=ParityLimits(0.99, 0.995, 0.93, 0.004, 1e-2),
        copied=2.7,  # 0.61 GiB in all
        tables=1.5,
        min_capability=(8, 9),  # Ada; the builder refuses E4M3 for older ones
    ),
}

SESSION_BYTES = 1 << 28
"""A process with its libraries and the activations of one batch (measured on the demo: 0.1 to 0.25 GiB)."""

CPU_ORDER = tuple(precision for precision, spec in SPECS.items() if spec.cpu)
GPU_ORDER = tuple(sorted(SPECS, key=lambda precision: SPECS[precision].gpu_rank))
"""Which variant is taken when none is named. On the CPU in the order of the rows: FP16 is slower than FP32 there."""


def runs_on(precision: str, provider: Provider) -> bool:
    """Return whether a provider runs the graphs of a precision; of one that this version does not know, True."""
    if precision not in SPECS or provider is Provider.AUTO:
        return True
    spec = SPECS[Precision(precision)]
    if provider in (Provider.CUDA, Provider.ORT_TENSORRT):
        return spec.cuda
    return spec.cpu if provider is Provider.CPU else spec.tensorrt


def multiplies_integers(precision: str) -> bool:
    """Return whether the graphs of a precision multiply 8-bit integers; False for one that is not known."""
    return precision in SPECS and SPECS[Precision(precision)].integer_products


def precision_spec(precision: str) -> PrecisionSpec:
    """Return the row of a precision.

    Raises:
        BundleError: this version does not know it.
    """
    try:
        return SPECS[Precision(precision)]
    except ValueError as err:
        raise BundleError(
            f"precision {precision!r}",
            "is not one that this version of gircse-deploy knows",
            f"it knows {', '.join(Precision)}",
            "Upgrade: pip install -U gircse-deploy",
        ) from err


def session_bytes(precision: str, *, weights: int, embeddings: int, copy_weights: bool = True) -> int:
    """Estimate the memory of a process with one session of the CPU provider.

    Args:
        precision: of a variant.
        weights: bytes of its weights.
        embeddings: elements of the embedding table.
        copy_weights: see ``load_graph``; what the system maps and can drop again is not counted.

    Raises:
        BundleError: this version does not know the precision.
    """
    spec = precision_spec(precision)
    return SESSION_BYTES + int(4 * spec.tables * embeddings) + (int(spec.copied * weights) if copy_weights else 0)
