"""Two servers that share a Redis."""
