"""Training: a change of weights that makes sharing of distant keys cost less. The engine knows nothing of it."""
