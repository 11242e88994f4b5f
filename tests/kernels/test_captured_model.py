"""Forwards that are replayed as CUDA graphs compute what the model computes."""

from __future__ import annotations

import pytest
import torch

from lmcache.blend.captured_model import CapturedModel
from lmcache.blend.graph_recorder import GraphRecorder
from lmcache.blend.host import Attend, StopForward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

LAYERS, HEADS, KV_HEADS, DIM, HIDDEN, VOCAB = 3, 4, 2, 16, 64, 97


class Model:
    """A decoder without positions in its attention; layers differ."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.embedding = torch.randn(VOCAB, HIDDEN, device="cuda")
        width = (HEADS + 2 * KV_HEADS) * DIM
        self.qkv = torch.randn(LAYERS, HIDDEN, width, device="cuda") / HIDDEN**0.5
        self.out = torch.randn(LAYERS, HEADS * DIM, HIDDEN, device="cuda") / HIDDEN**0.5

    def run(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        hidden = self.embedding[ids.long()] + positions[:, None] / 100
        for layer in range(LAYERS):
            parts = (hidden @ self.qkv[layer]).view(len(ids), -1, DIM).split((HEADS, KV_HEADS, KV_HEADS), 1)
            attended = attend(layer, *parts, scale=0.25)
            hidden = torch.nn.functional.silu(hidden + attended.reshape(len(ids), -1) @ self.out[layer])
        return hidden


def attend(
    layer_id: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, **_: object
) -> torch.Tensor:
    """Causal, of the rows among themselves."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * scale
    hidden = torch.ones(len(q), len(q), dtype=torch.bool, device="cuda").triu(1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def captured(model: Model) -> CapturedModel:
    with torch.inference_mode():
        return CapturedModel(model.run, torch.device("cuda"), sizes=(16, 32, 64))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40, 64])
@torch.inference_mode()
def test_every_size_computes_what_the_model_does(model: Model, captured: CapturedModel, count: int) -> None:
    ids, positions = torch.randint(VOCAB, (count,)).int(), torch.arange(count) * 3
    expected = model.run(ids.cuda(), positions.cuda(), attend)
    for _ in range(2):  # what an earlier forward left must not matter
        torch.testing.assert_close(captured.run(ids, positions, attend), expected, rtol=2e-3, atol=2e-3)
    other = captured.run((ids + 1) % VOCAB, positions, attend)
    assert not torch.allclose(other, expected, rtol=2e-3, atol=2e-3), "the ids must matter"


@torch.inference_mode()
def test_a_size_that_a_larger_one_beats_is_not_used(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = CapturedModel(model.run, torch.device("cuda"), sizes=(16, 32, 64))
    captured.keep_fastest()
    assert captured.max_rows == 64, "there must be one for as many rows as before"
    captured = CapturedModel(model.run, torch.device("cuda"), sizes=(16, 32, 64))
    took = {16: 1.0, 32: 3.0, 64: 2.0}
    monkeypatch.setattr(CapturedModel, "_layer_milliseconds", lambda _, forward: took[forward.size])
    captured.keep_fastest()
    assert [forward.size for forward in captured._forwards] == [16, 64]
    for count in (16, 17, 64):
        ids, positions = torch.randint(VOCAB, (count,)).int(), torch.arange(count)
        expected = model.run(ids.cuda(), positions.cuda(), attend)
        torch.testing.assert_close(captured.run(ids, positions, attend), expected, rtol=2e-3, atol=2e-3)


@torch.inference_mode()
def test_attention_finds_what_it_needs_in_the_same_memory_in_every_layer(captured: CapturedModel) -> None:
    seen = []

    def watch(layer_id: int, *qkv: torch.Tensor, scale: float, **options: object) -> torch.Tensor:
        seen.append([x.data_ptr() for x in qkv])
        return attend(layer_id, *qkv, scale=scale)

    captured.run(torch.zeros(20, dtype=torch.int32), torch.arange(20), watch)
    assert len(seen) == LAYERS
    assert all(where == seen[0] for where in seen)


@torch.inference_mode()
def test_a_forward_may_be_stopped_and_the_next_is_right(model: Model, captured: CapturedModel) -> None:
    ids, positions = torch.randint(VOCAB, (20,)).int(), torch.arange(20)
    expected = model.run(ids.cuda(), positions.cuda(), attend)

    def stop(layer_id: int, *qkv: torch.Tensor, **options: object) -> torch.Tensor:
        raise StopForward

    with pytest.raises(StopForward):
        captured.run(ids, positions, stop)
    torch.testing.assert_close(captured.run(ids, positions, attend), expected, rtol=2e-3, atol=2e-3)


def test_what_cannot_be_captured_is_refused_for_good_and_leaves_the_gpu_usable() -> None:
    recorder = GraphRecorder(torch.device("cuda"))
    x = torch.ones(4, device="cuda")
    recording = recorder.record(lambda: x * 2)
    assert recording is not None
    x.fill_(3)
    assert recording.replay().tolist() == [6.0] * 4
    assert recorder.record(lambda: torch.tensor(float(x.sum().item()))) is None, "waiting for the GPU"
    assert recorder.record(lambda: x * 2) is None
    assert len(torch.randn(5, device="cuda").cpu().unique()) == 5, "torch draws random numbers as before"
    assert (x + 1).sum().item() == 16
    assert recording.replay().tolist() == [6.0] * 4


def test_a_model_that_cannot_be_captured_says_so_and_leaves_the_gpu_usable(model: Model) -> None:
    def waits(ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        hidden = model.run(ids, positions, attend)
        return hidden / hidden.abs().max().item()

    with torch.inference_mode(), pytest.raises(RuntimeError):
        CapturedModel(waits, torch.device("cuda"), sizes=(16,))
    assert len(torch.randn(5, device="cuda").cpu().unique()) == 5
