"""From the name of a model to its weights and to its PyTorch reference."""
