"""Models: from a folder of weights to a runner, and from text to tokens. The only importer of transformers."""
