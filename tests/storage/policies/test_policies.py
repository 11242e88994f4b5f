from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.storage.policies import POLICIES, make_policy
from lmcache.storage.policies.interface import EvictionPolicy
from tests.storage.policies.conformance import PolicyConformance

KEYS = st.integers(0, 12)
STEPS = st.lists(st.tuples(st.sampled_from(["insert", "touch", "remove", "victim", "evict"]), KEYS, st.sets(KEYS)))


class TestLRU(PolicyConformance):
    policy_name = "LRU"

    def test_a_use_saves(self) -> None:
        policy = self.make(1, 2, 3)
        policy.touch(1)
        assert self.evict_all(policy) == [2, 3, 1]

    def test_a_use_saves_an_entry_that_was_passed_over(self) -> None:
        policy = self.make(1, 2, 3)
        policy.victim(lambda key: key == 3)
        policy.touch(1)
        assert self.evict_all(policy) == [2, 3, 1]


class TestFIFO(PolicyConformance):
    policy_name = "FIFO"

    def test_a_use_changes_nothing(self) -> None:
        policy = self.make(1, 2, 3)
        policy.touch(1)
        policy.insert(1)
        assert self.evict_all(policy) == [1, 2, 3]


class TestLFU(PolicyConformance):
    policy_name = "LFU"

    def test_fewest_uses_first_and_of_equals_the_longest_unused(self) -> None:
        policy = self.make(1, 2, 3, 4)
        for key in (1, 1, 4, 3):
            policy.touch(key)
        assert list(policy) == [2, 4, 3, 1]
        assert self.evict_all(policy) == [2, 4, 3, 1]

    def test_uses_are_forgotten_with_the_entry(self) -> None:
        policy = self.make(1, 2)
        for _ in range(5):
            policy.touch(1)
        policy.touch(2)
        policy.remove(1)
        policy.insert(1)
        assert self.evict_all(policy) == [1, 2]


class TestS3FIFO(PolicyConformance):
    policy_name = "S3FIFO"

    def test_one_use_does_not_save_but_two_do(self) -> None:
        policy = self.make(1, 2, 3)
        policy.touch(1)
        policy.touch(2)
        policy.touch(2)
        assert self.evict_all(policy) == [1, 3, 2]

    def test_what_returns_soon_after_its_eviction_goes_to_main(self) -> None:
        policy = self.make(*range(10))
        assert policy.victim(lambda key: True) == 0
        policy.remove(0)
        policy.insert(0)
        assert self.evict_all(policy)[-1] == 0

    def test_a_removal_that_is_no_eviction_is_not_remembered(self) -> None:
        policy = self.make(*range(10))
        policy.remove(3)
        policy.insert(3)
        policy.insert(10)
        assert self.evict_all(policy)[-2:] == [3, 10]

    def test_a_used_entry_of_main_gets_another_round(self) -> None:
        policy = self.make(1, 2)
        for key in (1, 1, 2, 2):
            policy.touch(key)
        assert policy.victim(lambda key: True) == 1  # both have moved to main, their uses are forgotten
        policy.touch(1)
        assert self.evict_all(policy) == [2, 1]

    def test_a_scan_does_not_displace_what_is_used_again(self) -> None:
        policy = self.make(*range(90))
        for key in range(90):
            policy.touch(key)
            policy.touch(key)
        for key in range(1_000, 3_000):
            policy.insert(key)
            if len(policy) > 100:
                victim = policy.victim(lambda key: True)
                assert victim is not None
                policy.remove(victim)
        assert sum(key < 90 for key in policy) == 90


@pytest.mark.parametrize("name", POLICIES)
@given(steps=STEPS)
def test_never_loses_or_invents_an_entry(name: str, steps: list[tuple[str, int, set[int]]]) -> None:
    policy: EvictionPolicy[int] = make_policy(name)
    known: set[int] = set()
    for action, key, pinned in steps:
        if action == "insert":
            policy.insert(key)
            known.add(key)
        elif action == "touch":
            policy.touch(key)
        elif action == "remove":
            policy.remove(key)
            known.discard(key)
        else:
            free = known - pinned
            victim = policy.victim(free.__contains__)
            assert (victim in free) if free else (victim is None)
            if action == "evict" and victim is not None:
                policy.remove(victim)
                known.remove(victim)
        assert set(policy) == known
        assert len(list(policy)) == len(policy) == len(known)
    while (victim := policy.victim(known.__contains__)) is not None:
        policy.remove(victim)
        known.remove(victim)
    assert known == set()


def test_every_policy_is_tested() -> None:
    tested = {test.policy_name for test in PolicyConformance.__subclasses__()}
    assert tested == set(POLICIES)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'2Q': must be one of LRU, LFU, FIFO, S3FIFO"):
        make_policy("2Q")
