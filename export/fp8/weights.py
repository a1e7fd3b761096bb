"""What ``fp8`` stores in place of the checkpoint's weights: E4M3 numbers with a scale for every output channel."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor

from gircse.calibration.int8.rounding import WeightGrid
from gircse.export.fp8.e4m3 import E4M3_GRID, E4M3_MAX, check_fp16
from gircse.export.int8.weights import InitializerSpec, QuantizedProduct, ReadBlocks


@dataclass(frozen=True)
class Fp8Product(QuantizedProduct):
    """The weights of one FP8 product (in, out), as those of an integer one; scales and outlier channels are FP16."""

    grid: WeightGrid = E4M3_GRID

    @property
    def weight_name(self) -> str:
        """Name of the E4M3 numbers."""
        return f"{self.name}.fp8"

    @property
    def initializers(self) -> Mapping[str, InitializerSpec]:
        """Numbers (in, out), scales (out,), and the rows (n, out) of outlier channels where there are any."""
        types = {self.weight_name: ir.DataType.FLOAT8E4M3FN}
        return {
            name: InitializerSpec(types.get(name, ir.DataType.FLOAT16), spec.shape)
            for name, spec in super().initializers.items()
        }

    def tensors(self, read: ReadBlocks) -> Mapping[str, Tensor]:
        """Smooth and round by the moments, which takes time, or to nearest where there are none.

        Raises:
            ExportError: FP16 cannot hold a weight.
        """
        made = dict(super().tensors(read))
        for name, tensor in made.items():
            if name != self.weight_name:
                largest = E4M3_MAX if name == self.scale_name else 1.0
                check_fp16(float(tensor.abs().max()) * largest, name)
                made[name] = tensor.half()
        return made
