"""Compare a bundle with a reference, step by step, and judge it."""
