"""Measure bundles against baselines."""
