"""Measure a bundle: parity with a reference, quality on tasks, speed against baselines."""
