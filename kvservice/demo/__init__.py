"""The demonstration: a long document, three recipes, three questions, and where the bytes are."""
