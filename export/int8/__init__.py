"""Rewrite graphs and weights to INT8 by a calibration."""
