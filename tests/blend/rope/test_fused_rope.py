from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache.blend.rope import FusedRope, RopeFrequencies
from lmcache.blend.rope_scaling import default_frequencies, dynamic_ntk_frequencies, yarn_frequencies
from tests.blend.rope.reference import error_bound, rotated

FARTHEST = 1_000_000
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def keys(num_tokens: int, heads: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_tokens, heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rope(rotary_dim: int = 32, head_size: int | None = 32, theta: float = 10_000.0, **options: bool) -> FusedRope:
    return FusedRope(default_frequencies(rotary_dim, theta), head_size=head_size, **options)


class TestAgainstRotatingDirectly:
    @given(
        moves=st.lists(st.tuples(st.integers(0, FARTHEST), st.integers(0, FARTHEST)), min_size=1, max_size=6),
        heads=st.integers(1, 3),
        rotary_dim=st.sampled_from([2, 4, 16, 64, 128]),
        rest=st.sampled_from([0, 1, 16, 64]),
        theta=st.sampled_from([1e4, 5e5, 1e7]),
        dtype=st.sampled_from(DTYPES),
        is_neox_style=st.booleans(),
        rotary_at_end=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    def test_error_is_that_of_one_rounding(
        self, moves, heads, rotary_dim, rest, theta, dtype, is_neox_style, rotary_at_end, seed
    ):
        head_size = rotary_dim + rest
        fused = rope(rotary_dim, head_size, theta, is_neox_style=is_neox_style, rotary_at_end=rotary_at_end)
        offset = rest if rotary_at_end else 0
        old, new = torch.tensor(moves).T
        k = keys(len(moves), heads, head_size, dtype, seed)
        inv_freq = fused.frequencies().inv_freq
        unrotated = rotated(k, -old, inv_freq, is_neox_style=is_neox_style, offset=offset)
        direct = rotated(unrotated, new, inv_freq, is_neox_style=is_neox_style, offset=offset)
        untouched = torch.ones(head_size, dtype=torch.bool)
        untouched[offset : offset + rotary_dim] = False
        before = k.clone()

        fused.fused_encode(old, new, k)

        error = (k.to(torch.float64) - direct).abs()
        assert (error <= error_bound(direct, rotary_dim, offset, is_neox_style, dtype)).all()
        assert torch.equal(k[..., untouched], before[..., untouched])

    @pytest.mark.parametrize("is_neox_style", [True, False])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_nearly_every_element_is_the_correctly_rounded_one(self, dtype, is_neox_style):
        fused = rope(64, 64, is_neox_style=is_neox_style)
        old, new = torch.arange(700), torch.arange(700) + 123_456
        k = keys(700, 4, 64, dtype)
        exact = rotated(k, new - old, fused.frequencies().inv_freq, is_neox_style=is_neox_style)
        fused.fused_encode(old, new, k)
        assert (k == exact.to(dtype)).double().mean() > 0.998

    def test_float64_is_kept(self):
        k = keys(5, 2, 32, torch.float64)
        fused = rope()
        exact = rotated(k, torch.full((5,), 77), fused.frequencies().inv_freq)
        fused.fused_encode(3, 80, k)
        torch.testing.assert_close(k, exact, rtol=0, atol=1e-14)

    def test_many_tokens_are_turned_alike_in_whatever_blocks(self):
        k = keys(5_000, 2, 64)
        old = torch.arange(5_000)
        new = old.flip(0)
        fused = rope(64, 64)
        rows = [0, 1, 2_047, 2_048, 4_095, 4_999]
        alone = fused.fused_encode(old[rows], new[rows], k[rows])
        fused.fused_encode(old, new, k)
        assert torch.equal(k[rows], alone)


class TestMoves:
    @given(
        there=st.integers(0, FARTHEST),
        start=st.integers(0, FARTHEST),
        dtype=st.sampled_from(DTYPES),
        is_neox_style=st.booleans(),
    )
    def test_there_and_back(self, there, start, dtype, is_neox_style):
        k = keys(4, 2, 32, dtype)
        before = k.clone()
        old, new = start + torch.arange(4), there + torch.arange(4)
        fused = rope(is_neox_style=is_neox_style)
        fused.fused_encode(new, old, fused.fused_encode(old, new, k))
        # Two roundings, one of them turned into both elements of its pair.
        torch.testing.assert_close(
            k, before, rtol=0, atol=2 * torch.finfo(dtype).eps * float(before.abs().max()) + 1e-6
        )

    def test_what_stays_keeps_every_bit(self):
        k = keys(4, 2, 32, torch.bfloat16)
        k[0, 0, 0] = float("inf")
        before = k.clone()
        rope().fused_encode(torch.arange(4), torch.arange(4), k)
        assert torch.equal(k, before)

    def test_one_position_for_all_is_one_a_token(self):
        new = torch.full((4,), 90)
        expected = rope().fused_encode(torch.full((4,), 7), new, keys(4, 2, 32))
        for old, to in [(7, 90), (torch.tensor(7), torch.tensor([90])), (torch.tensor([7], dtype=torch.int32), new)]:
            assert torch.equal(rope().fused_encode(old, to, keys(4, 2, 32)), expected)

    def test_only_the_distance_counts(self):
        a = rope().fused_encode(torch.arange(4), torch.arange(4) + 500, keys(4, 2, 32))
        b = rope().fused_encode(0, 500, keys(4, 2, 32))
        assert torch.equal(a, b)

    def test_no_tokens(self):
        empty = torch.empty(0, 2, 32)
        assert rope().fused_encode(torch.empty(0, dtype=torch.int64), 5, empty) is empty

    @pytest.mark.parametrize("is_neox_style", [True, False])
    def test_fused_is_reverse_then_forward(self, is_neox_style):
        frequencies = yarn_frequencies(32, 1e4, factor=8.0, original_max_position_embeddings=4096)
        assert frequencies.attention_scaling > 1.1
        fused = FusedRope(frequencies, head_size=32, is_neox_style=is_neox_style)
        old, new = torch.arange(6), torch.tensor([5, 9, 1000, 2, 77, 0])
        q, k = keys(6, 4, 32), keys(6, 2, 32, seed=1)
        expected_q, expected_k = q.clone(), k.clone()
        for heads in (expected_q, expected_k):
            fused.fused_encode(old, new, heads)
        moved = fused.encode(new, *fused.reverse_encode(old, q, k))
        assert moved[0] is q
        assert moved[1] is k
        torch.testing.assert_close(q, expected_q, rtol=0, atol=2e-6)
        torch.testing.assert_close(k, expected_k, rtol=0, atol=2e-6)

    def test_encode_is_the_models_rotation_with_its_scaling(self):
        frequencies = RopeFrequencies(torch.tensor([1.0, 0.25]), attention_scaling=1.5)
        k = keys(3, 1, 4)
        expected = rotated(k, torch.arange(3), frequencies.inv_freq, scaling=1.5)
        FusedRope(frequencies, head_size=4).encode(torch.arange(3), keys(3, 2, 4), k)
        torch.testing.assert_close(k.double(), expected, rtol=0, atol=1e-6)

    def test_encoders_take_flat_heads_as_the_v0_blender_gives_them(self):
        fused = rope(16, 16)
        q, k = keys(5, 4, 16), keys(5, 2, 16)
        flat_q, flat_k = q.reshape(5, 64).clone(), k.reshape(5, 32).clone()
        fused.encode(torch.arange(5), q, k)
        fused.encode(torch.arange(5), flat_q, flat_k)
        assert torch.equal(flat_q, q.reshape(5, 64))
        assert torch.equal(flat_k, k.reshape(5, 32))


class TestInPlace:
    def test_returns_the_same_tensor(self):
        k = keys(4, 2, 32)
        assert rope().fused_encode(0, 5, k) is k

    @pytest.mark.parametrize("is_neox_style", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "view",
        [
            lambda store: store.view(12, 2, 3, 40)[:, 0],  # K of pages [T, 2, H, D]
            lambda store: store.view(2, 3, 12, 40)[0].transpose(0, 1),  # [H, T, D] of transformers
            lambda store: store.view(12, 2, 3, 40)[::2, 1],
            lambda store: store.view(24, 3, 40)[3:9],
            lambda store: store.view(24, 120)[5:17],  # [T, H·D]
            lambda store: store.view(12, 240)[:, 120:],
        ],
    )
    def test_views_of_a_store_are_turned_where_they_lie(self, view, dtype, is_neox_style):
        store = keys(24, 3, 40, dtype).reshape(-1)
        before = store.clone()
        k = view(store)
        fused = rope(24, 40, is_neox_style=is_neox_style)
        old, new = torch.arange(len(k)), torch.arange(len(k)) + 31
        expected = fused.fused_encode(old, new, k.clone())
        fused.fused_encode(old, new, k)
        assert torch.equal(view(store), expected)
        view(before).copy_(expected)
        assert torch.equal(store, before), "something outside the view changed"

    def test_odd_strides_and_offsets(self):
        store = keys(1, 1, 6 * 35 + 1).reshape(-1)
        k = store[1:].view(6, 1, 35)[..., 1:]
        fused = rope(32, 34, is_neox_style=False)
        expected = fused.fused_encode(0, 9, k.clone())
        assert torch.equal(fused.fused_encode(0, 9, k), expected)

    def test_overlapping_memory_is_refused_and_not_written(self):
        k = keys(1, 1, 32).expand(4, 2, 32)
        before = k.clone()
        with pytest.raises(RuntimeError, match="single memory location"):
            rope().fused_encode(0, 5, k)
        assert torch.equal(k, before)

    def test_with_and_without_gradients_and_inference_mode(self):
        expected = rope().fused_encode(0, 5, keys(4, 2, 32))
        with torch.inference_mode():
            made_in_inference_mode = keys(4, 2, 32)
        assert torch.equal(rope().fused_encode(0, 5, made_in_inference_mode), expected)
        of_a_model = keys(4, 2, 32).requires_grad_() * 1
        assert torch.equal(rope().fused_encode(0, 5, of_a_model), expected)

    def test_mla_turns_the_end_of_a_vector_of_any_width(self):
        fused = rope(16, None, rotary_at_end=True)
        part = keys(4, 1, 16)
        latent = keys(4, 1, 48, seed=1)
        whole = torch.cat((latent, part), dim=-1)
        fused.fused_encode(3, 900, whole)
        assert torch.equal(whole[..., :48], latent)
        assert torch.equal(whole[..., 48:], fused.fused_encode(3, 900, part))


class TestLengths:
    def dynamic(self) -> FusedRope:
        frequencies = dynamic_ntk_frequencies(32, 1e4, factor=4.0, max_position_embeddings=2048)
        return FusedRope(frequencies, head_size=32)

    @pytest.mark.parametrize("is_neox_style", [True, False])
    def test_move_between_length_classes_with_other_scaling(self, is_neox_style):
        short = RopeFrequencies(1 / 100.0 ** (torch.arange(8) / 8), attention_scaling=1.25)
        long = RopeFrequencies(1 / 300.0 ** (torch.arange(8) / 8), attention_scaling=1.5)
        fused = FusedRope(lambda n: long if n > 50 else short, head_size=16, is_neox_style=is_neox_style)
        old, new = torch.tensor([0, 3, 40]), torch.tensor([60, 3, 7])
        plain = keys(3, 2, 16, torch.float64)
        k = rotated(plain, old, short.inv_freq, scaling=1.25, is_neox_style=is_neox_style)
        expected = rotated(plain, new, long.inv_freq, scaling=1.5, is_neox_style=is_neox_style)
        fused.fused_encode(old, new, k, old_length=41, new_length=70)
        torch.testing.assert_close(k, expected, rtol=0, atol=1e-12)

    def test_a_key_turns_even_where_it_stays(self):
        k = keys(2, 1, 32)
        fused = self.dynamic()
        before = k.clone()
        assert torch.equal(fused.fused_encode(9, 9, k, old_length=100, new_length=2000), before)
        assert not torch.equal(fused.fused_encode(9, 9, k, old_length=100, new_length=9000), before)

    def test_lengths_of_one_class_are_a_plain_move(self):
        a = self.dynamic().fused_encode(3, 90, keys(4, 2, 32), old_length=10, new_length=2048)
        assert torch.equal(a, rope().fused_encode(3, 90, keys(4, 2, 32)))

    def test_missing_length_is_refused(self):
        fused = self.dynamic()
        assert fused.depends_on_length
        with pytest.raises(ValueError, match="old_length and new_length"):
            fused.fused_encode(3, 90, keys(4, 2, 32), new_length=100)
        with pytest.raises(ValueError, match="at_length"):
            fused.encode(3, keys(4, 2, 32), keys(4, 2, 32))

    def test_at_length_fixes_it(self):
        fixed = self.dynamic().at_length(8192)
        assert not fixed.depends_on_length
        a = fixed.fused_encode(3, 90, keys(4, 2, 32))
        b = self.dynamic().fused_encode(3, 90, keys(4, 2, 32), old_length=8192, new_length=8192)
        assert torch.equal(a, b)

    def test_a_rope_that_does_not_care_takes_lengths_too(self):
        k = rope().fused_encode(3, 90, keys(4, 2, 32), old_length=5, new_length=500)
        assert torch.equal(k, rope().fused_encode(3, 90, keys(4, 2, 32)))


class TestRefusals:
    @pytest.mark.parametrize(
        ("k", "message"),
        [
            (torch.zeros(4, 2, 16), r"\[T, H, 32\]"),
            (torch.zeros(4, 2, 64), r"\[T, H, 32\]"),
            (torch.zeros(4, 33), r"\[T, H·32\]"),
            (torch.zeros(32), r"\[T, H, 32\]"),
            (torch.zeros(1, 4, 2, 32), r"got \[1, 4, 2, 32\]"),
            (torch.zeros(4, 2, 32, dtype=torch.int8), "int8"),
            (torch.zeros(4, 2, 32, dtype=torch.float8_e4m3fn), "dequantise"),
        ],
    )
    def test_keys_that_do_not_fit(self, k, message):
        with pytest.raises(ValueError, match=message):
            rope().fused_encode(0, 1, k)

    def test_flat_keys_need_the_head_size(self):
        with pytest.raises(ValueError, match=r"\[T, H, 32 or more\]"):
            rope(head_size=None).fused_encode(0, 1, torch.zeros(4, 64))

    @pytest.mark.parametrize(
        ("positions", "message"),
        [
            (torch.arange(3), "3 positions for 4 tokens"),
            (torch.arange(4.0), "integers"),
            (torch.ones(4, dtype=torch.bool), "integers"),
            (1.5, "integers"),
            (torch.zeros(3, 4, dtype=torch.int64), "mRoPE"),
        ],
    )
    def test_positions_that_do_not_fit(self, positions, message):
        k = torch.ones(4, 2, 32)
        with pytest.raises(ValueError, match=message):
            rope().fused_encode(positions, 1, k)
        with pytest.raises(ValueError, match=message):
            rope().fused_encode(1, positions, k)
        assert (k == 1).all()

    def test_construction(self):
        with pytest.raises(ValueError, match="does not fit"):
            rope(64, 32)
        with pytest.raises(ValueError, match="inv_freq"):
            RopeFrequencies(torch.zeros(2, 2))
        with pytest.raises(ValueError, match="inv_freq"):
            RopeFrequencies(torch.zeros(0))
        with pytest.raises(ValueError, match="attention_scaling"):
            RopeFrequencies(torch.ones(2), attention_scaling=0.0)
