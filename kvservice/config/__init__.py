"""Settings: pydantic models, frozen, unknown names refused. Read once, in `cli`."""
