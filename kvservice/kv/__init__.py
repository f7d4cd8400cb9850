"""The tensor nouns: layout, arena, blocks, sequence, partial results, ledger. No policy."""
