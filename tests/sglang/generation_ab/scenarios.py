"""What is done with SGLang's own radix caches. ``old_sglang.run`` runs each function in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from lmcache.integration.sglang.tp_agreement import min_over_ranks
from tests.leaks import LeakDetector
from tests.sglang.generation_ab import torchvision_ops

detector = LeakDetector()
detector.install()
torchvision_ops.define()

from tests.sglang.generation_ab.radix_world import World, environment  # noqa: E402 - after the lines above

PROMPT = list(range(1, 100))


def reuse(mode: str) -> dict[str, Any]:
    """The cache of one prompt: whole, longer, and behind a part that SGLang still has."""
    rows = []
    for page in (1, 4, 16):
        for chunk in (8, 16, 24):
            environment(chunk_size=chunk, max_local_cpu_size=0.05)
            world = World(_folder(), mode, page)
            served = {"cold": world.serve(PROMPT, [100, 101, 102])}
            world.forget()
            served["again"] = world.serve(PROMPT, [100, 101, 102])
            served["longer"] = world.serve([*PROMPT, 100, 101, 102, 7, 8, 9], [55, 56])
            world.forget()
            served["short"] = world.serve(PROMPT[:13], [3])
            served["behind_resident"] = world.serve([*PROMPT, 100, 101], [4])
            served["other_tenant"] = world.serve([*PROMPT, 100, 101], [4], extra_key="other")
            rows.append({"page": page, "chunk": chunk, "served": _plain(served), **_account(world)})
    return {"rows": rows}


def unaligned_chunks(mode: str) -> dict[str, Any]:
    """Chunks whose ends are no pages' ends, and a last one that is not full."""
    rows = []
    for page in (4, 16):
        environment(chunk_size=10, max_local_cpu_size=0.05, save_unfull_chunk=True)
        world = World(_folder(), mode, page)
        world.serve(PROMPT[:70], [100, 101])
        world.forget()
        served = {"again": world.serve(PROMPT[:70], [100, 101]), "branch": world.serve([*PROMPT[:55], 9, 9, 9], [1])}
        rows.append({"page": page, "served": _plain(served), **_account(world)})
    return {"rows": rows}


def corrupted(mode: str) -> dict[str, Any]:
    """The control: these tests tell wrong KV from right."""
    environment(chunk_size=16, max_local_cpu_size=0.05)
    world = World(_folder(), mode, 4)
    world.serve(PROMPT, [100])
    for obj in world.connector._manager.storage.memory._entries.values():
        obj.tensor.neg_()
    world.forget()
    return {"served": _plain({"again": world.serve(PROMPT, [100])})}


def stored_nodes(mode: str) -> dict[str, Any]:
    """How much of the tree is locked once a request is done and stored, and once another one is looked up."""
    environment(chunk_size=16, max_local_cpu_size=0.05)
    world = World(_folder(), mode, 1)
    world.serve(PROMPT, [100, 101])
    locked = [int(world.radix.protected_size())]
    world.serve([9, *PROMPT[:40]], [1])
    req = world.request([8, *PROMPT[:40]])
    world.lookup(req, [8, *PROMPT[:40]])
    locked.append(int(world.radix.protected_size()))
    return {"locked": locked, "failures": _failures(world)}


def storm(mode: str, page: int, requests: int = 100, disk: str | None = None) -> dict[str, Any]:
    """Random requests with shared prefixes in a pool that is too small for them, some given up while queued."""
    settings = {"local_disk": disk, "max_local_disk_size": 1} if disk else {}
    environment(chunk_size=8, max_local_cpu_size=0.01, **settings)
    world = World(_folder(), mode, page, slots=320)
    choose = random.Random(page)
    heads = [[choose.randrange(1000) for _ in range(choose.randrange(20, 90))] for _ in range(6)]
    loaded = wrong = 0
    for number in range(requests):
        head = choose.choice(heads)
        prompt = head[: choose.randrange(8, len(head) + 1)] + [choose.randrange(1000) for _ in range(number % 23)]
        if number % 5 == 4:  # matched, and never scheduled
            world.lookup(world.request(prompt), prompt)
        served = world.serve(prompt, [choose.randrange(1000) for _ in range(1 + number % 4)])
        loaded, wrong = loaded + served.loaded, wrong + served.wrong
        if number % 17 == 16:
            world.forget()
    account = _account(world)
    return {"loaded": loaded, "wrong": wrong, **account}


def faults(mode: str) -> dict[str, Any]:
    """Every call that a connector makes fails, one after the other."""
    environment(chunk_size=16, max_local_cpu_size=0.05, enable_kv_events=True)
    world = World(_folder(), mode, 4)
    engine = world.connector._cache.engine
    world.serve(PROMPT, [100])
    answers = {}
    for owner, name in [
        (engine, "retrieve"),
        (engine, "prefetch"),
        (engine, "prefix_keys"),
        (engine, "store"),
        (engine, "take_events"),
        (engine, "clear"),
        (engine.storage, "find"),
        (engine.storage, "acquire_leading"),
        (engine.gpu_connector, "batched_to_gpu"),
        (engine.gpu_connector, "batched_from_gpu"),
        (world.connector._cache, "load"),
        (world.connector._cache, "agree"),
        (world.connector._cache, "store"),
    ]:
        world.forget()
        before = _failures(world)
        setattr(owner, name, _fail)
        try:
            served = world.serve(PROMPT, [100, *range(200, 240)])
            world.connector.get_kv_events()
            world.connector.reset()
        finally:
            delattr(owner, name)
        answers[name] = {**dataclasses.asdict(served), "failures": _failures(world) - before}
        world.forget()
        world.serve(PROMPT, [100])
    world.forget()
    answers["healed"] = dataclasses.asdict(world.serve(PROMPT, [100]))
    return {"answers": answers, **_account(world)}


def first_life(mode: str, disk: str) -> dict[str, Any]:
    """Serve, and end without a word to the connector, as SGLang does."""
    environment(chunk_size=16, max_local_cpu_size=0.05, local_disk=disk, max_local_disk_size=1)
    world = World(_folder(), mode, 4)
    served = _plain({"cold": world.serve(PROMPT, [100, 101])})
    globals()["kept"] = world
    return {"served": served}


def second_life(mode: str, disk: str) -> dict[str, Any]:
    environment(chunk_size=16, max_local_cpu_size=0.05, local_disk=disk, max_local_disk_size=1)
    world = World(_folder(), mode, 4)
    served = _plain({"again": world.serve(PROMPT, [100, 101])})
    tiers = world.connector._cache.engine.stats().reused_tokens
    return {"served": served, "reused": tiers, **_account(world)}


def two_ranks(mode: str) -> dict[str, Any]:
    """Tensor parallelism: ranks that hold unequal parts, and one that fails, agree through SGLang's own group."""
    folder = _folder()
    torch.multiprocessing.start_processes(rank_of_two, (mode, str(folder)), nprocs=2, start_method="fork")
    return {"ranks": [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]}


def rank_of_two(rank: int, mode: str, folder: str) -> None:
    environment(chunk_size=16, max_local_cpu_size=0.05)
    group = two_rank_group(rank, folder)
    home = Path(folder, str(rank))
    home.mkdir()
    world = World(home, mode, 4, tp_size=2, rank=rank, tp_group=group)
    engine = world.connector._cache.engine
    served = {"cold": world.serve(PROMPT, [100])}
    world.forget()
    served["again"] = world.serve(PROMPT, [100])
    if rank == 1:
        for key in engine.prefix_keys(PROMPT, paged=True)[2:]:
            assert engine.storage.memory.remove(key)
    world.forget()
    served["unequal"] = world.serve(PROMPT[:90], [100])
    if rank == 1:
        engine.retrieve = _fail
    world.forget()
    served["one_fails"] = world.serve(PROMPT, [100])
    given = [world.connector._cache._tp_group, group, group.device_group]
    agreed = [min_over_ranks(5 - rank, (one,), torch.device("cpu")) for one in given]
    Path(folder, f"{rank}.json").write_text(json.dumps({"served": _plain(served), "agreed": agreed, **_account(world)}))


def two_rank_group(rank: int, folder: str) -> Any:
    """SGLang's ``GroupCoordinator`` of two processes."""
    from sglang.srt.distributed import parallel_state

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    return parallel_state.GroupCoordinator(
        group_ranks=[[0, 1]],
        local_rank=rank,
        torch_distributed_backend="gloo",
        use_pynccl=False,
        use_pymscclpp=False,
        use_custom_allreduce=False,
        use_torch_symm_mem_all_reduce=False,
        use_hpu_communicator=False,
        use_xpu_communicator=False,
        use_npu_communicator=False,
        group_name="tp",
    )


def _folder() -> Path:
    return Path(mkdtemp())


def _plain(served: dict[str, Any]) -> dict[str, Any]:
    return {name: dataclasses.asdict(one) for name, one in served.items()}


def _account(world: World) -> dict[str, Any]:
    """What must be even in the end: slots, locks, references to KV."""
    account = {"unaccounted": world.unaccounted(), "locked": world.locked(), "failures": _failures(world)}
    for request in range(world._count + 1):
        if world.mode == "MP":
            world.connector.end_session(f"r{request}")
    leaks = detector.leaks()
    world.connector.close()
    return {**account, "leaks": leaks + detector.leaks()}


def _failures(world: World) -> int:
    samples = world.connector.metrics.snapshot()
    return int(sum(count for name, count in samples.items() if name.startswith("lmcache_failures_total")))


def _fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("injected")
