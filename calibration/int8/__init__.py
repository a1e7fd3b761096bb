"""The INT8 scheme: what is quantized, and the arithmetic of smoothing, rounding and clipping."""
