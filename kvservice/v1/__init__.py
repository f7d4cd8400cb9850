"""Generated stubs of the public API. Never edited: `make protos` writes them."""
