"""The engine: admission, steps, sampling. Runs alone on any torch device; knows nothing of Ray, gRPC or Redis."""

from kvservice.engine.engine import Engine

__all__ = ["Engine"]
