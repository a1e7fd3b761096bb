"""The PyTorch side: finds a checkpoint and computes the reference vectors."""
