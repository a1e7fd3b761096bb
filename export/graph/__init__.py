"""Trace a decoder and compose the graphs of a bundle."""
