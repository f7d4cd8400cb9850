"""The protocol between gateway and worker."""
