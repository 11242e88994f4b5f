"""What every eviction policy must do. A policy's test class inherits this and names the policy.

The property test over all of them stands in test_policies.py: hypothesis wants one function, not one a class.
"""

from __future__ import annotations

from typing import ClassVar

from lmcache.storage.policies import make_policy
from lmcache.storage.policies.interface import EvictionPolicy
from lmcache.storage.policies.victim_queue import RECHECK


def anything(key: int) -> bool:
    return True


class PolicyConformance:
    policy_name: ClassVar[str]

    def make(self, *keys: int) -> EvictionPolicy[int]:
        policy: EvictionPolicy[int] = make_policy(self.policy_name)
        for key in keys:
            policy.insert(key)
        return policy

    def evict_all(self, policy: EvictionPolicy[int]) -> list[int]:
        order = []
        while (key := policy.victim(anything)) is not None:
            policy.remove(key)
            order.append(key)
        return order

    def test_names(self) -> None:
        assert self.make().name == self.policy_name
        assert make_policy(self.policy_name.lower()).name == self.policy_name

    def test_empty(self) -> None:
        policy = self.make()
        assert policy.victim(anything) is None
        assert len(policy) == 0
        assert list(policy) == []

    def test_unused_entries_go_in_the_order_they_came(self) -> None:
        assert self.evict_all(self.make(3, 1, 2)) == [3, 1, 2]

    def test_iterates_coldest_first(self) -> None:
        policy = self.make(3, 1, 2)
        order = list(policy)
        assert self.evict_all(policy) == order

    def test_a_victim_stays_until_it_is_removed(self) -> None:
        policy = self.make(1, 2)
        assert policy.victim(anything) == policy.victim(anything) == 1
        assert sorted(policy) == [1, 2]

    def test_only_an_evictable_entry_is_proposed(self) -> None:
        policy = self.make(1, 2, 3)
        assert policy.victim(lambda key: key == 2) == 2
        assert policy.victim(lambda key: False) is None

    def test_entries_passed_over_keep_their_place(self) -> None:
        policy = self.make(*range(10))
        assert policy.victim(lambda key: key >= 5) == 5
        assert policy.victim(lambda key: False) is None
        assert list(policy) == list(range(10))
        assert self.evict_all(policy) == list(range(10))

    def test_a_second_insert_adds_nothing(self) -> None:
        policy = self.make(1, 2, 1)
        assert len(policy) == 2
        assert sorted(self.evict_all(policy)) == [1, 2]

    def test_unknown_keys_are_ignored(self) -> None:
        policy = self.make(1)
        policy.touch(9)
        policy.remove(9)
        assert list(policy) == [1]

    def test_a_removed_entry_may_come_back(self) -> None:
        policy = self.make(1, 2)
        policy.remove(1)
        policy.insert(1)
        assert sorted(self.evict_all(policy)) == [1, 2]

    def test_touched_entries_all_go_in_the_end(self) -> None:
        policy = self.make(*range(5))
        for key in (0, 0, 0, 0, 0, 3, 3, 4):
            policy.touch(key)
        assert sorted(self.evict_all(policy)) == list(range(5))

    def test_a_long_run_of_pinned_entries_is_not_walked_again_and_again(self) -> None:
        pinned, others = 5_000, 1_000
        policy = self.make(*range(pinned + others))
        looks = 0

        def evictable(key: int) -> bool:
            nonlocal looks
            looks += 1
            return key >= pinned

        for _ in range(others):
            key = policy.victim(evictable)
            assert key is not None
            policy.remove(key)
        # Once over the run, then a bounded number of second looks for each eviction.
        assert looks <= pinned + others * 2 * (RECHECK + 1)
        assert list(policy) != []
        assert sorted(policy) == list(range(pinned))

    def test_an_entry_unpinned_in_a_long_run_is_found_when_nothing_else_is_left(self) -> None:
        policy = self.make(*range(1_000))
        assert policy.victim(lambda key: False) is None
        assert policy.victim(lambda key: key == 700) == 700
