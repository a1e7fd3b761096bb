"""Measures a model for its INT8 variants: ranges, smoothing, second moments, sensitivity."""
