"""Compare a bundle with a reference, step by step, and evaluate_gates it."""
