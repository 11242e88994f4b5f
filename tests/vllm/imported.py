"""What a scenario's process has imported before it begins: ten of the fifteen seconds that a vLLM takes to start."""

import torch  # noqa: F401
from vllm import LLM, SamplingParams  # noqa: F401
from vllm.config import KVTransferConfig  # noqa: F401
