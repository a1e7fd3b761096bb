"""Files of texts to files of vectors, in fragments that are done once: ``gircse-bulk``."""
