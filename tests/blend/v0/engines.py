"""Engines and retrievals that obey the test."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace

import torch

LAYERS, HEADS, DIM = 3, 2, 4
TOKEN_DIM = {"vllm": 2, "huggingface": 3}


def blob_of(tokens, fmt="vllm", dtype=torch.float32):
    """KV in which token ``t`` at place ``p`` of its segment has ``t + p/8`` plus the number of its layer, plane, head
    and dim in hundreds of thousands."""
    tokens = torch.as_tensor(tokens)
    places = torch.arange(LAYERS * 2 * HEADS * DIM).view(LAYERS, 2, 1, HEADS, DIM) * 1000
    blob = (tokens + torch.arange(len(tokens)) / 8).view(1, 1, -1, 1, 1) + places
    return (blob if fmt == "vllm" else blob.transpose(2, 3)).to(dtype).contiguous()


def leading_mask(count, length, dtype=torch.bool):
    return (torch.arange(length) < count).to(dtype)


def done(answer):
    future = Future()
    if isinstance(answer, BaseException):
        future.set_exception(answer)
    else:
        future.set_result(answer)
    return future


def hit(tokens, count=None, fmt="vllm", mask_dtype=torch.bool, dtype=torch.float32):
    """The finished retrieval of the first ``count`` tokens of a segment, by default of all."""
    count = len(tokens) if count is None else count
    kv = blob_of(tokens[:count], fmt, dtype) if count else ()
    return done((kv, leading_mask(count, len(tokens), mask_dtype)))


def metadata(fmt="vllm"):
    return SimpleNamespace(fmt=fmt)


class Engine:
    """Holds every segment but those of ``misses``; nothing but ``retrieve``. With ``gate`` each call waits for it."""

    def __init__(self, misses=(), fmt="vllm", gate=None):
        self.misses = [list(segment) for segment in misses]
        self.fmt = fmt
        self.gate = gate
        self.asked: list[list[int]] = []
        self.threads: set[threading.Thread] = set()

    def retrieve(self, tokens, mask=None, return_tuple=True):
        assert mask is None
        assert return_tuple is False
        self.asked.append(tokens.tolist())
        self.threads.add(threading.current_thread())
        if self.gate is not None:
            assert self.gate.wait(30)
        if tokens.tolist() in self.misses:
            return (), leading_mask(0, len(tokens))
        return blob_of(tokens, self.fmt), leading_mask(len(tokens), len(tokens))
