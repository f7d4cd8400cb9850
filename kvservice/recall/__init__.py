"""Between tier and attention: what of the distant KV comes back to the device, and where it is put."""
