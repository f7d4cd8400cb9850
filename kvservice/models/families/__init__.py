"""One file an architecture: its names for figures and tensors. Discovered by the loader."""
