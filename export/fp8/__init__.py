"""Round weights and activations to FP8 by a calibration."""
