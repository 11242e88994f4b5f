"""What is read from a config: older spellings, and models that cannot be moved."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

from lmcache.blend.rope import FusedRope, UnsupportedRopeError
from lmcache.blend.rope_from_config import ropes_from_config
from tests.blend.rope.configs import LONGROPE, llama, phi3_longrope

BASE = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}


def config(**attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**BASE, **attributes})


def first(config: Any) -> FusedRope:
    rope = ropes_from_config(config)[0]
    assert rope is not None
    return rope


def same(a: FusedRope, b: FusedRope) -> bool:
    lengths = (1, 512, 513, 4096) if a.depends_on_length else (None,)
    return repr(a) == repr(b) and all(
        torch.equal(a.frequencies(n).inv_freq, b.frequencies(n).inv_freq)
        and a.frequencies(n).attention_scaling == b.frequencies(n).attention_scaling
        for n in lengths
    )


class TestConfigsBeforeTransformers5:
    def test_theta_alone(self):
        old = config(rope_theta=50_000.0)
        assert same(first(old), first(llama({"rope_type": "default", "rope_theta": 50_000.0})))

    @pytest.mark.parametrize("spelling", ["type", "rope_type"])
    @pytest.mark.parametrize("parameters", [{"factor": 4.0}, {"factor": 2.0}])
    def test_linear(self, spelling, parameters):
        old = config(rope_theta=10_000.0, rope_scaling={spelling: "linear", **parameters})
        new = llama({"rope_type": "linear", "rope_theta": 10_000.0, **parameters})
        assert same(first(old), first(new))

    def test_yarn_of_qwen(self):
        scaling = {"factor": 4.0, "original_max_position_embeddings": 1024}
        old = config(rope_theta=1e6, rope_scaling={"type": "yarn", **scaling})
        assert same(first(old), first(llama({"rope_type": "yarn", "rope_theta": 1e6, **scaling})))

    def test_dynamic(self):
        old = config(rope_theta=1e4, rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=512)
        new = llama({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, 512)
        assert same(first(old), first(new))

    @pytest.mark.parametrize("spelling", ["longrope", "su"])
    def test_longrope_of_phi3(self, spelling):
        scaling = {"type": spelling, "short_factor": LONGROPE["short_factor"], "long_factor": LONGROPE["long_factor"]}
        old = config(model_type="phi3", rope_theta=10_000.0, rope_scaling=scaling, original_max_position_embeddings=512)
        assert same(first(old), first(phi3_longrope()))

    def test_partial_rotary_factor(self):
        assert first(config(rope_theta=1e4, partial_rotary_factor=0.5)).rotary_dim == 8

    def test_gpt_neox(self):
        old = first(config(model_type="gpt_neox", rotary_pct=0.25, rotary_emb_base=10_000))
        assert (old.rotary_dim, old.head_size) == (4, 16)

    def test_gemma3(self):
        scaling = {"rope_type": "linear", "factor": 8.0}
        kinds = ["sliding_attention", "full_attention"]
        old = config(
            rope_theta=1e6, rope_local_base_freq=10_000.0, rope_scaling=scaling, layer_types=kinds, head_dim=32
        )
        new = config(
            rope_parameters={
                "full_attention": {"rope_theta": 1e6, **scaling},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
            layer_types=kinds,
            head_dim=32,
        )
        for a, b in zip(ropes_from_config(old), ropes_from_config(new), strict=True):
            assert same(a, b)

    def test_olmo3_scales_its_full_attention_alone(self):
        scaling = {"rope_type": "linear", "factor": 8.0}
        kinds = ["sliding_attention", "full_attention"]
        sliding, full = ropes_from_config(
            config(model_type="olmo3", rope_theta=5e5, rope_scaling=scaling, layer_types=kinds)
        )
        assert same(sliding, first(config(rope_theta=5e5)))
        assert same(full, first(config(rope_theta=5e5, rope_scaling=scaling)))


class TestShapes:
    def test_head_size_from_the_hidden_size(self):
        assert first(config(rope_theta=1e4)).head_size == 16

    def test_mla(self):
        rope = first(config(model_type="deepseek_v3", rope_theta=1e4, qk_rope_head_dim=8, kv_lora_rank=32))
        assert (rope.rotary_dim, rope.head_size, rope.rotary_at_end, rope.is_neox_style) == (8, None, True, True)

    def test_the_text_part_of_a_multimodal_model(self):
        text = llama()
        assert same(first(SimpleNamespace(get_text_config=lambda: text)), first(text))

    def test_a_base_for_each_layer(self):
        ropes = ropes_from_config(config(rope_theta=1e4, layer_rope_theta=[0, 5e5]))
        assert ropes[0] is None
        assert same(ropes[1], first(config(rope_theta=5e5)))


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "name", "reason"),
        [
            (hf.GPT2Config(), "gpt2", "no RoPE"),
            (hf.OPTConfig(), "opt", "no RoPE"),
            (hf.BloomConfig(), "bloom", "no RoPE"),
            (hf.MptConfig(), "mpt", "no RoPE"),
            (hf.FalconConfig(alibi=True), "falcon", "ALiBi"),
            (hf.GraniteMoeHybridConfig(position_embedding_type=None), "granitemoehybrid", "not RoPE"),
            (hf.JambaConfig(), "jamba", "no RoPE"),
            (hf.Qwen2VLConfig(), "qwen2_vl", "mRoPE"),
            (hf.Qwen2_5_VLConfig(), "qwen2_5_vl", "mRoPE"),
            (hf.Qwen3VLConfig(), "qwen3_vl", "mRoPE"),
            (llama({"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}), "llama", "mRoPE"),
            (hf.Gemma4TextConfig(), "gemma4", "way of its own"),
            (hf.NanoChatConfig(), "nanochat", "way of its own"),
            (hf.DeepseekV4Config(), "deepseek_v4", "RoPE parameters are those of"),
            (config(rope_theta=1e4, rope_scaling={"type": "ntk-of-tomorrow"}), "llama", "ntk-of-tomorrow"),
            (config(rope_theta=1e4, rope_scaling={"type": "dynamic", "alpha": 1000.0}), "llama", "alpha"),
            (config(rope_theta=1e4, rope_scaling={"type": "llama3", "factor": 8.0}), "llama", "lack high_freq_factor"),
            (config(rope_theta=1e4, no_rope_layers=[0, 0]), "llama", "none of its layers"),
            (config(rope_theta=1e4, num_hidden_layers=None), "llama", "how many layers"),
        ],
    )
    def test_in_words(self, config, name, reason):
        with pytest.raises(UnsupportedRopeError, match=reason) as caught:
            ropes_from_config(config)
        message = str(caught.value)
        assert message.startswith(name)
        assert "cannot be blended" in message
        assert "exact prefixes works as ever" in message

    def test_is_a_value_error(self):
        assert issubclass(UnsupportedRopeError, ValueError)
