"""Studies: the same run with different settings and seeds, and what can be told from it."""
