"""kvservice: a distributed LLM inference service for long-document sessions of many tenants."""

__version__ = "0.1.0"
