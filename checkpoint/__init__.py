"""Checkpoints: found, downloaded, read, and run by PyTorch as the reference."""
