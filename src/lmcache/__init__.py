"""A KV-cache layer for LLM serving: exact prefix reuse and CacheBlend."""
