"""Measure bundles beside their baselines."""
