"""The seam between the engine and published methods: protocols, and what may be combined."""
