"""Attention of one step: parts per sequence, merged. Reaches the tier through `recall` only."""
