"""The public side of the service: tenants, sessions, routing, admission. Knows no tensor, tokenizer or Redis."""
