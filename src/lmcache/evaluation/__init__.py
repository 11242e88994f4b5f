"""The quality gate, ``lmcache evaluate``: how far answers drift when the KV of passages is reused instead of computed.

Generated tasks, or the user's, are answered after a full prefill and after blends with every policy and budget.
"""
