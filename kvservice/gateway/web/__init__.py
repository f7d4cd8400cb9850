"""The OpenAI-compatible HTTP API: a second way in to the same calls. Knows no session's record and no worker."""
