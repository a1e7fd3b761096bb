"""Serve bundles to programs of other kinds: an HTTP endpoint, bulk jobs, Triton, and adapters."""
