"""Where a bundle can run."""

from enum import StrEnum


class Provider(StrEnum):
    """What computes the vectors; ``auto`` picks the best of the others that is installed and usable.

    ``tensorrt`` and ``tensorrt-rtx`` run engines of ``gircse-build``; the others run the graphs in ONNX Runtime.
    """

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    ORT_TENSORRT = "onnxruntime-tensorrt"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
