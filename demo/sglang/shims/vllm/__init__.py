"""Not vLLM: holds the one kernel that SGLang asks vLLM for on a machine without an accelerator."""
