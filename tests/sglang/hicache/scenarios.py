"""SGLang's own factory and host pools on our HiCache backend, beside its own file backend."""

from __future__ import annotations

import random
from typing import Any

import torch

from tests.leaks import LeakDetector
from tests.sglang.generation_ab import torchvision_ops

detector = LeakDetector()
detector.install()
torchvision_ops.define()

from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorage, HiCacheStorageConfig  # noqa: E402
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.storage import StorageBackendFactory  # noqa: E402

LAYERS, HEADS, DIM, SLOTS = 3, 2, 4, 256


def host_pool(layout: str, page_size: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """SGLang's host pool without the device pool that its constructor wants."""
    pool = MHATokenToKVPoolHost.__new__(MHATokenToKVPoolHost)
    pool.layout, pool.page_size, pool.dtype, pool.device, pool.pin_memory = layout, page_size, dtype, "cpu", False
    pool.layer_num, pool.head_num, pool.head_dim, pool.v_head_dim = LAYERS, HEADS, DIM, DIM
    shape = {
        "layer_first": (2, LAYERS, SLOTS, HEADS, DIM),
        "page_first": (2, SLOTS, LAYERS, HEADS, DIM),
        "page_first_direct": (2, SLOTS // page_size, LAYERS, page_size, HEADS, DIM),
    }[layout]
    pool.kv_buffer = torch.randint(-99, 99, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return pool


def backend(pool: Any, model: str = "some/model", **fields: Any) -> HiCacheStorage:
    extra = {
        "backend_name": "lmcache",
        "module_path": "lmcache.integration.sglang.hicache_storage",
        "class_name": "LMCacheHiCacheStorage",
        "interface_v1": 1,
        "lmcache.max_local_cpu_size": 0.01,
        **fields.pop("extra", {}),
    }
    made = StorageBackendFactory.create_backend("dynamic", config(model, extra_config=extra, **fields), pool)
    made.register_mem_pool_host(pool)
    made.on_host_pools_registered()
    return made


def config(model: str, **fields: Any) -> HiCacheStorageConfig:
    given = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1,
        "is_mla_model": False, "enable_storage_metrics": False, "is_page_first_layout": False, "model_name": model,
    }  # fmt: skip
    return HiCacheStorageConfig(**{**given, **fields})


def pages(_: str) -> dict[str, Any]:
    """Every layout and page size, through both of SGLang's interfaces."""
    rows = []
    for layout in ("layer_first", "page_first", "page_first_direct"):
        for size in (1, 4, 16):
            pool = host_pool(layout, size)
            storage = backend(pool)
            keys, indices = [f"{i:064x}" for i in range(4)], torch.arange(4 * size) + 2 * size
            before = [pool.get_data_page(int(i)).clone() for i in indices[::size]]
            row = {"absent": storage.batch_exists(keys), "missed": storage.batch_get_v1(keys, indices)}
            row["kept"] = storage.batch_set_v1(keys, indices)
            row["present"] = storage.batch_exists([*keys, "nobody"])
            pool.kv_buffer.zero_()
            row["got"] = storage.batch_get_v1([*keys, "nobody"], torch.arange(5 * size) + 2 * size)
            row["equal"] = _equal(before, [pool.get_data_page(int(i)) for i in indices[::size]])
            generic = storage.batch_get([*keys, "nobody"], [pool.get_dummy_flat_data_page() for _ in range(5)])
            row["generic_equal"] = generic[4] is None and _equal(before, generic[:4])
            row["again"] = storage.batch_set(keys, before)
            storage.clear()
            row["cleared"] = storage.batch_exists(keys)
            storage.close()
            rows.append({"layout": layout, "size": size, **row})
    return {"rows": rows, "leaks": detector.leaks()}


def like_the_file_backend(_: str, folder: str) -> dict[str, Any]:
    """Random calls give what SGLang's own file backend gives."""
    pool = host_pool("layer_first", 4)
    ours, theirs = backend(pool), HiCacheFile(config("some/model"), folder)
    choose = random.Random(1)
    differing = 0
    for _step in range(400):
        keys = [f"{choose.randrange(20):064x}" for _ in range(choose.randrange(1, 4))]
        values = [pool.get_data_page(4 * int(key, 16)) for key in keys]
        targets = [[pool.get_dummy_flat_data_page() for _ in keys] for _ in range(2)]
        what = choose.choice(["set", "get", "exists", "batch_exists", "batch_set", "batch_get"])
        if what in ("set", "batch_set"):
            count = 1 if what == "set" else len(keys)
            answers = [one.batch_set(keys[:count], values[:count]) for one in (ours, theirs)]
        elif what == "exists":
            answers = [one.exists(keys[0]) for one in (ours, theirs)]
        elif what == "batch_exists":
            answers = [one.batch_exists(keys) for one in (ours, theirs)]
        else:
            got = [one.batch_get(keys, target) for one, target in zip((ours, theirs), targets, strict=True)]
            # We stop at the first miss, as SGLang does with what it gets.
            answers = [_until_miss(one) for one in got]
        differing += answers[0] != answers[1]
    ours.close()
    return {"differing": differing, "leaks": detector.leaks()}


def apart(_: str, folder: str) -> dict[str, Any]:
    """Other models, shards, dtypes and arrangements find nothing; the same finds it after a restart."""
    disk = {"lmcache.local_disk": folder, "lmcache.max_local_disk_size": 1}
    pool = host_pool("layer_first", 4)
    first = backend(pool, extra=disk)
    keys = [f"{i:064x}" for i in range(4)]
    page = pool.get_data_page(8)
    first.batch_set(keys, [page] * 4)
    first.close()
    found = {}
    for name, other, fields in [
        ("same", pool, {}),
        ("model", pool, {"model": "other/model"}),
        ("tp", pool, {"tp_size": 2, "tp_rank": 0}),
        ("pp", pool, {"pp_size": 2, "pp_rank": 0}),
        ("layout", host_pool("page_first", 4), {}),
        ("page", host_pool("layer_first", 8), {}),
        ("dtype", host_pool("layer_first", 4, torch.float16), {}),
    ]:
        storage = backend(other, extra=disk, **fields)
        found[name] = storage.batch_exists(keys)
        if name == "same":
            target = other.get_dummy_flat_data_page()
            found["equal"] = torch.equal(storage.get(keys[0], target), page)
        storage.close()
    return {"found": found, "leaks": detector.leaks()}


def faults(_: str) -> dict[str, Any]:
    """Every call of the tiers fails; hybrid pools are refused in words; wrong sizes are misses."""
    pool = host_pool("layer_first", 4)
    storage = backend(pool)
    keys, indices = ["a", "b"], torch.arange(8)
    assert all(storage.batch_set_v1(keys, indices))
    answers = {}
    for name in ("find", "acquire_leading", "renew", "allocate", "put", "clear"):
        setattr(storage._storage, name, _fail)
        answers[name] = [
            storage.exists("a"), storage.batch_exists(keys), any(storage.batch_get_v1(keys, indices)),
            storage.batch_set(["c"], [pool.get_data_page(0)]), storage.clear(),
        ]  # fmt: skip
        delattr(storage._storage, name)
        storage.batch_set_v1(keys, indices)
    wrong = [storage.get("a"), storage.get("a", torch.zeros(3)), storage.set("d", torch.zeros(3)), storage.set("d")]
    failures = sum(value for name, value in storage.metrics.snapshot().items() if "failures_total" in name)
    storage.register_mem_host_pool_v2(pool, "mamba")
    try:
        storage.on_host_pools_registered()
        refused = ""
    except ValueError as error:
        refused = str(error)
    storage.close()
    after = [storage.exists("a"), storage.batch_set_v1(keys, indices), storage.batch_get_v1(keys, indices)]
    return {
        "answers": answers, "wrong": wrong, "failures": failures, "refused": refused, "after_close": after,
        "leaks": detector.leaks(),
    }  # fmt: skip


def _until_miss(got: list[torch.Tensor | None]) -> list[list[float]]:
    pages = []
    for page in got:
        if page is None:
            break
        pages.append(page.float().tolist())
    return pages


def _equal(expected: list[torch.Tensor], got: list[Any]) -> bool:
    return all(map(torch.equal, expected, got))


def _fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("injected")
