"""Match the weights of graphs with a checkpoint and stream them to disk."""
