"""Run TensorRT engines: the engine, its buffers, its streams."""
