from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from lmcache.observability.events import CacheStoreEvent, EventBuffer


def event(number: int) -> CacheStoreEvent:
    return CacheStoreEvent(
        block_hashes=[number.to_bytes(4, "big")],
        parent_block_hash=None,
        token_ids=[number],
        lora_id=None,
        block_size=1,
        medium="cpu",
    )


def test_taken_once_in_order() -> None:
    buffer = EventBuffer()
    for number in range(3):
        buffer.add(event(number))
    assert buffer.take() == [event(0), event(1), event(2)]
    assert buffer.take() == []


def test_the_oldest_go_first_and_are_counted() -> None:
    buffer = EventBuffer(capacity=2)
    for number in range(5):
        buffer.add(event(number))
    assert buffer.dropped == 3
    assert buffer.take() == [event(3), event(4)]
    buffer.add(event(5))
    assert buffer.dropped == 3


def test_every_event_is_taken_by_exactly_one_thread() -> None:
    buffer = EventBuffer()

    def work(start: int) -> list[CacheStoreEvent]:
        taken = []
        for number in range(start, start + 200):
            buffer.add(event(number))
            taken += buffer.take()
        return taken

    with ThreadPoolExecutor(8) as pool:
        taken = [item for part in pool.map(work, range(0, 1600, 200)) for item in part] + buffer.take()
    assert sorted(item.token_ids[0] for item in taken) == list(range(1600))
    assert buffer.dropped == 0
