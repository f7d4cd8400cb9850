"""One worker: an engine in a thread of its own, and the internal gRPC service in front of it."""
