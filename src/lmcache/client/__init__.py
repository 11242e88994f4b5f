"""What talks to a running server: reading documents in ahead of time, and telling what was reused."""
