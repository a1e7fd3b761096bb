"""Compare a bundle with a reference, step by step, with gates."""
