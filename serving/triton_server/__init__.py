"""Triton Inference Server: the model repository of a bundle, and the Python model in it."""
