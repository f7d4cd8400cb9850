"""Compute kernels behind one interface. The torch reference runs on any device; faster ones come beside it."""
