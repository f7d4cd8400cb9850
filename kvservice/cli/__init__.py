"""The commands, one module a group, and the composition root. Heavy imports are made inside the commands."""
