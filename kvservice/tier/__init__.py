"""Where KV lies below the device: bytes in, bytes out."""
