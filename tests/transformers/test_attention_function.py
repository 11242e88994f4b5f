"""The model's own attention comes back, whatever happens; what cannot be honoured is refused."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers

from lmcache.blend.host import StopForward
from lmcache.integration.transformers import UnsupportedModelError
from lmcache.integration.transformers.attention_function import NAME, AttentionSwitch, attention
from lmcache.integration.transformers.host import TransformersHost, TransformersModel
from tests.transformers.small_models import CONFIGS, VOCAB, own_prefill, random_ids, small_model

IDS = random_ids(20)


def implementations(model: Any) -> list[str | None]:
    configs = [model.config, *(module.config for module in model.modules() if hasattr(module, "config"))]
    return [config._attn_implementation for config in configs]


def zeros(layer_id: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    return q.new_zeros(*q.shape[:2], v.shape[-1])


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("error", [None, StopForward, ZeroDivisionError])
def test_switched_only_inside(before: str, error: type[Exception] | None) -> None:
    model = small_model("llama", attention=before)
    plain = own_prefill(model, IDS).logits
    inside = []

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        inside.append(implementations(model))
        if error is not None:
            raise error
        return zeros(*args, **kwargs)

    host = TransformersHost(TransformersModel(model), [IDS])
    rows = torch.arange(len(IDS))
    if error is None:
        host.forward(rows, rows, attend)
    else:
        with pytest.raises(error):
            host.forward(rows, rows, attend)
    assert set(inside[0]) == {NAME}
    assert set(implementations(model)) == {before}
    assert torch.equal(own_prefill(model, IDS).logits, plain)


def test_parts_of_a_model_get_back_what_each_had() -> None:
    text = CONFIGS["gemma3"]().to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation={"text_config": "eager", "vision_config": "sdpa"}
    ).eval()
    before = implementations(model)
    assert {"eager", "sdpa"} <= set(before)
    with AttentionSwitch(model).calling(zeros):
        assert set(implementations(model)) == {NAME}
    assert implementations(model) == before


def test_nested_and_shared_by_two_models() -> None:
    config = CONFIGS["llama"]()
    config._attn_implementation = "sdpa"
    one, two = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    assert one.config is two.config
    with AttentionSwitch(one).calling(zeros):
        with AttentionSwitch(two).calling(zeros):
            assert config._attn_implementation == NAME
        assert config._attn_implementation == NAME
    assert config._attn_implementation == "sdpa"


def test_blends_in_two_threads_do_not_disturb_each_other() -> None:
    model = small_model("llama")
    held = TransformersModel(model)
    rows = torch.arange(len(IDS))
    meet = threading.Barrier(2, timeout=20)
    outputs: dict[float, torch.Tensor] = {}

    def run(fill: float) -> None:
        def attend(layer_id: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
            meet.wait()
            return q.new_full((*q.shape[:2], v.shape[-1]), fill)

        outputs[fill] = TransformersHost(held, [IDS]).forward(rows, rows, attend)

    threads = [threading.Thread(target=run, args=(fill,)) for fill in (0.0, 1.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(implementations(model)) == {"sdpa"}
    assert not torch.allclose(outputs[0.0], outputs[1.0])
    for fill, output in outputs.items():
        again = TransformersHost(held, [IDS]).forward(
            rows, rows, lambda i, q, k, v, fill=fill, **_: q.new_full((*q.shape[:2], v.shape[-1]), fill)
        )
        torch.testing.assert_close(output, again)


def test_the_model_cannot_run_by_itself_in_the_middle_of_a_blend() -> None:
    model = small_model("llama")
    found: list[Exception] = []

    def run_by_itself() -> None:
        try:
            own_prefill(model, IDS)
        except RuntimeError as error:
            found.append(error)

    with AttentionSwitch(model).calling(zeros):
        thread = threading.Thread(target=run_by_itself)
        thread.start()
        thread.join()
    assert "another thread" in str(found[0])


def test_no_mask_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("gemma2")
    masks = []

    def look(*args: Any, **kwargs: Any) -> torch.Tensor:
        masks.append(args[4] if len(args) > 4 else kwargs["attention_mask"])
        return attention(*args, **kwargs)  # type: ignore[return-value]

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, NAME, look)
    rows = torch.tensor([1, 2, 7, 19])  # gaps, which transformers would take for packed sequences
    TransformersHost(TransformersModel(model), [IDS]).forward(rows, rows, zeros)
    assert masks == [None] * 4


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_idx = 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"head_mask": torch.ones(2)}, "head_mask"),
        ({"output_attentions": True}, "output_attentions"),
        ({"is_causal": False}, "not causal"),
        ({"dropout": 0.1}, "dropout"),
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, "mask of its own"),
        ({"key": torch.zeros(1, 2, 6, 8)}, "no self-attention"),
        ({"query": torch.zeros(2, 2, 4, 8)}, "no self-attention"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], reason: str) -> None:
    heads = torch.zeros(1, 2, 4, 8)
    arguments = {"query": heads, "key": heads, "value": heads, "attention_mask": None, **options}
    with AttentionSwitch(small_model("llama")).calling(zeros), pytest.raises(UnsupportedModelError, match=reason):
        attention(Layer(), **arguments)


def test_training_mode_is_refused() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIGS["llama"]()).train()
    rows = torch.arange(len(IDS))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        TransformersHost(TransformersModel(model), [IDS]).forward(rows, rows, zeros)


def test_logits_of_the_last_rows_only() -> None:
    """One a prompt whose end is among the rows, and not computed for the others."""
    model = small_model("llama")
    prompts = [IDS[:8], IDS[8:13], IDS[13:]]
    rows = torch.tensor([2, 7, 9, 15, 19])
    positions = torch.tensor([2, 7, 1, 2, 6])
    logits = TransformersHost(TransformersModel(model), prompts).forward(rows, positions, zeros)
    assert logits.shape == (2, VOCAB)
    alone = TransformersHost(TransformersModel(model), [IDS[13:]]).forward(torch.tensor([6]), torch.tensor([6]), zeros)
    torch.testing.assert_close(logits[1:], alone, atol=1e-5, rtol=1e-5)
