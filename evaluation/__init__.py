"""Measures what a bundle is worth: parity with a reference, quality on tasks, speed beside its peers."""
