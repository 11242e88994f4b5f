"""Benchmarks on a GPU: real vLLM with the shape of Llama-3.1-8B and random weights, no network and no tokenizer needed.

They are run from the repository's root, ``python -m benchmarks.gpu.ttft`` and so on; ``docs/performance.md`` says how.
"""
