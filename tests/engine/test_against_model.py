"""Random use, compared with what a dictionary of prefixes would do."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine.helpers import CHUNK, PagesConnector, SlowTier, kv_of, leading, make_engine, tokens_of

FAMILIES = [tokens_of(6 * CHUNK, seed) for seed in range(3)]


@st.composite
def prompts(draw):
    """Prompts that share prefixes with each other, of any length, some branching off inside a chunk."""
    base = draw(st.sampled_from(FAMILIES))
    cut = draw(st.integers(0, len(base)))
    branch = draw(st.integers(0, 2))
    return base[:cut] + (tokens_of(draw(st.integers(0, 2 * CHUNK)), 100 + branch) if branch else [])


class EngineMachine(RuleBasedStateMachine):
    """``stored`` are the prefixes (up to the end of a chunk) stored since the last clear: an eviction may take
    any of them away, but nothing else may ever be found, and what is found has the bytes of its prefix."""

    @initialize(tails=st.booleans(), tiny=st.booleans(), slow=st.booleans(), keep=st.booleans())
    def start(self, tails, tiny, slow, keep):
        self.tails, self.exact = tails, not tiny
        self.slow = SlowTier(hold_reads=False)
        self.connector = PagesConnector(num_slots=8 * CHUNK)
        size = 64 / 1024 / 1024 if tiny else 4 / 1024
        self.engine = make_engine(
            [self.slow] if slow or not keep else [],
            connector=self.connector,
            save_unfull_chunk=tails,
            max_local_cpu_size=size,
            local_cpu=keep,
            local_disk="unused",
        )
        self.stored: dict[bool, set[tuple[int, ...]]] = {True: set(), False: set()}
        self.pinned: list[tuple[list[int], bool]] = []

    def teardown(self):
        if hasattr(self, "engine"):
            for tokens, paged in self.pinned:
                self.engine.unpin(tokens, paged=paged)
            self.engine.clear()
            assert self.engine.storage.memory.pool.used_bytes == 0, "every reference is back"
            self.engine.close()

    def ends(self, tokens):
        ends = list(range(CHUNK, len(tokens) + 1, CHUNK))
        return [*ends, len(tokens)] if self.tails and len(tokens) % CHUNK else ends

    def expected(self, tokens, paged):
        """The end of the longest stored prefix of ``tokens``."""
        hit = 0
        for end in self.ends(tokens):
            if tuple(tokens[:end]) not in self.stored[paged]:
                break
            hit = end
        return hit

    @rule(tokens=prompts(), paged=st.booleans(), data=st.data())
    def store(self, tokens, paged, data):
        start = data.draw(st.integers(0, len(tokens)))
        mask = torch.arange(len(tokens)) >= start
        if paged:
            slots = torch.randperm(8 * CHUNK)[: len(tokens)]
            self.connector.pages[:, :, slots] = kv_of(tokens)
            count = self.engine.store(tokens, mask=mask, slot_mapping=torch.where(mask, slots, -1))
        else:
            count = self.engine.store(tokens, kv_of(tokens), mask)
        starts = [0, *self.ends(tokens)]
        new = [(begin, end) for begin, end in itertools.pairwise(starts) if begin >= start]
        if self.exact:
            unknown = [(begin, end) for begin, end in new if tuple(tokens[:end]) not in self.stored[paged]]
            assert count == sum(end - begin for begin, end in unknown)
        self.stored[paged].update(tuple(tokens[:end]) for _, end in new)

    @rule(tokens=prompts(), paged=st.booleans())
    def lookup(self, tokens, paged):
        hit, expected = self.engine.lookup(tokens, paged=paged), self.expected(tokens, paged)
        assert hit == expected if self.exact else hit in [0, *self.ends(tokens)] and hit <= expected

    @rule(tokens=prompts(), paged=st.booleans(), data=st.data(), leased=st.booleans())
    def retrieve(self, tokens, paged, data, leased):
        start = data.draw(st.integers(0, len(tokens)))
        mask = torch.arange(len(tokens)) >= start
        lease = self.engine.prefetch(tokens, paged=paged) if leased else None
        if paged:
            slots = torch.randperm(8 * CHUNK)[: len(tokens)]
            self.connector.pages.fill_(-1)
            found = self.engine.retrieve(tokens, mask, slot_mapping=slots, lease=lease)
            got = self.connector.pages[:, :, slots[found]]
            rest = torch.ones(8 * CHUNK, dtype=torch.bool)
            rest[slots[found]] = False
            assert bool((self.connector.pages[:, :, rest] == -1).all()), "no other page is touched"
        else:
            got, found = self.engine.retrieve(tokens, mask, return_tuple=False, lease=lease)
        if lease is not None:
            lease.release()
        end = start + int(found.sum())
        assert torch.equal(found, leading(end, len(tokens), start)), (
            "a hit is a run from the first token that is wanted"
        )
        assert end == start or end in self.ends(tokens)
        if end > start:
            assert torch.equal(got, kv_of(tokens)[:, :, start:end]), "the bytes that were stored for this prefix"
        if self.exact and start == 0:
            assert end == self.expected(tokens, paged)

    @rule(tokens=prompts(), paged=st.booleans())
    def pin(self, tokens, paged):
        assert self.engine.pin(tokens, paged=paged) <= self.expected(tokens, paged)
        self.pinned.append((tokens, paged))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data):
        tokens, paged = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))
        self.engine.unpin(tokens, paged=paged)

    @precondition(lambda self: not self.pinned)
    @rule()
    def clear(self):
        self.engine.clear()
        for prefixes in self.stored.values():
            prefixes.clear()

    @rule()
    def lose_memory(self):
        """All that is only in memory may go at any time."""
        keys = self.engine.storage.memory.keys()
        removed = [key for key in keys if self.engine.storage.memory.remove(key)]
        if any(not self.slow.contains(key) for key in removed):
            self.exact = False

    @invariant()
    def within_limits(self):
        if hasattr(self, "engine"):
            memory = self.engine.storage.memory.stats()
            assert memory.used_bytes <= memory.capacity_bytes


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=150, derandomize=True, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
