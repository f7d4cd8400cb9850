"""One file an architecture: what sets it apart. Discovered by the loader. What they share is in `decoder`."""
