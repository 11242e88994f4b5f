"""``make demo-sglang``: the conversation of ``make demo`` with a real SGLang server."""
