"""``make demo``: a conversation with a real vLLM server whose KV cache outlives it."""
