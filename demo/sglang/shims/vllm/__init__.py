"""Not vLLM: holds the one kernel that SGLang wants to import from vLLM on a machine without an accelerator."""
