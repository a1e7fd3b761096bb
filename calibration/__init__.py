"""Measure a model for INT8: ranges, smoothing, second moments, sensitivity."""
