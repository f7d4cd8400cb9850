"""Generated stubs of the internal API. Never edited: `make protos` writes them."""
