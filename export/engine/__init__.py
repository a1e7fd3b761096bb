"""Build TensorRT engines of a bundle."""
