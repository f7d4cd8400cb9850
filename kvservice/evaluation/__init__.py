"""How good answers are, beside `dense`: distances of distributions, and retrieval. In process, on one engine."""
