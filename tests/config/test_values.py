"""Values as they are written in YAML, in the environment and in JSON, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lmcache.config import LMCacheEngineConfig
from lmcache.storage.policies import POLICIES


def config(**values: Any) -> LMCacheEngineConfig:
    return LMCacheEngineConfig.from_defaults(**values)


def test_defaults_are_the_documented_ones() -> None:
    defaults = config()
    assert defaults.chunk_size == 256
    assert defaults.local_cpu is True
    assert defaults.max_local_cpu_size == 5.0
    assert defaults.local_disk is None
    assert defaults.cache_policy == "LRU"
    assert defaults.blend_check_layers == (1,)
    assert defaults.blend_recompute_ratios == (0.15,)
    assert defaults.blend_special_str == " # # "
    assert not any(
        getattr(defaults, key) for key in ("save_decode_cache", "save_unfull_chunk", "use_layerwise", "enable_blending")
    )


def test_is_frozen() -> None:
    with pytest.raises(ValidationError):
        config().chunk_size = 1  # type: ignore[misc]


def test_survives_pickling_with_its_sources() -> None:
    """An engine may send it to worker processes."""
    sent = pickle.loads(pickle.dumps(config(chunk_size=128)))
    assert sent == config(chunk_size=128)
    assert sent.source_of("chunk_size") == "argument chunk_size"


def test_every_key_says_what_it_is() -> None:
    assert all(field.description for field in LMCacheEngineConfig.model_fields.values())


@pytest.mark.parametrize("text", ["True", "true", "1", "yes", "on", " True "])
def test_ways_to_say_yes(text: str) -> None:
    assert config(save_decode_cache=text).save_decode_cache is True


@pytest.mark.parametrize("text", ["False", "false", "0", "no", "off"])
def test_ways_to_say_no(text: str) -> None:
    assert config(enable_blending=text).enable_blending is False


@pytest.mark.parametrize("text", ["2", "[2]", " 2 ", 2, [2], (2,)])
def test_ways_to_write_a_list_of_one(text: object) -> None:
    assert config(blend_check_layers=text).blend_check_layers == (2,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4).map(lambda ratios: sorted(ratios, reverse=True)))
def test_lists_read_alike_with_commas_and_as_json(ratios: list[float]) -> None:
    layers = list(range(len(ratios)))
    written = config(blend_check_layers=layers, blend_recompute_ratios=",".join(map(repr, ratios)))
    assert written == config(blend_check_layers=str(layers), blend_recompute_ratios=str(ratios))
    assert written.blend_recompute_ratios == tuple(ratios)


@pytest.mark.parametrize("name", ["lru", "Lfu", "FIFO", "S3-FIFO", "s3fifo"])
def test_policy_names_have_no_case(name: str) -> None:
    assert config(cache_policy=name).cache_policy == name.upper().replace("-", "")


def test_every_policy_that_exists_can_be_configured() -> None:
    assert [config(cache_policy=name).cache_policy for name in POLICIES] == list(POLICIES)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("/var/kv", "/var/kv"),
        ("file:///var/kv/", "/var/kv"),
        ("file://localhost/var/kv", "/var/kv"),
        ("file:///var/my%20kv#1", "/var/my kv#1"),
        (Path("/var/kv"), "/var/kv"),
    ],
)
def test_directories(written: object, meant: str) -> None:
    assert config(local_disk=written).local_disk == Path(meant)


def test_directories_do_not_move_with_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert config(local_disk="kv").local_disk == tmp_path / "kv"
    assert config(local_disk="~/kv").local_disk == Path("/home/somebody/kv")


@pytest.mark.parametrize("text", ["", "none", "None", "null", None])
def test_no_directory(text: object) -> None:
    assert config(local_disk=text).local_disk is None


@pytest.mark.parametrize("text", ["s3://bucket/kv", "file://host/kv", "redis://localhost:6379"])
def test_a_directory_is_local(text: str) -> None:
    with pytest.raises(ValueError, match="file:///var/cache/lmcache"):
        config(local_disk=text)


def test_text_is_taken_as_it_is() -> None:
    assert config(blend_special_str="[1]").blend_special_str == "[1]"
    assert config(blend_special_str="\n").blend_special_str == "\n"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("chunk_size", 0, "a whole number, 1 … 65536"),
        ("chunk_size", "abc", "a whole number, 1 … 65536"),
        ("chunk_size", 2.5, "a whole number, 1 … 65536"),
        ("chunk_size", True, "a whole number, 1 … 65536"),
        ("max_local_cpu_size", 0, "a number, more than 0"),
        ("max_local_cpu_size", "nan", "a number, more than 0"),
        ("max_local_cpu_size", "inf", "a number, more than 0"),
        ("max_local_disk_size", -1, "a number, 0 or more"),
        ("local_cpu", "maybe", "true, yes, on or 1; false, no, off or 0"),
        ("local_disk", 3, "a directory or none"),
        ("cache_policy", "MRU", "one of LRU, LFU, FIFO, S3FIFO"),
        ("lmcache_instance_id", "", "text, not empty"),
        ("blend_check_layers", "[]", "a list, not empty, of a whole number, 0 or more each"),
        ("blend_check_layers", [True], "a list, not empty, of a whole number, 0 or more each"),
        ("blend_recompute_ratios", [1.5], "a list, not empty, of a number, 0 … 1 each"),
        ("extra_config", "[1]", "a JSON object"),
        ("extra_config", '{"a": ', "a JSON object"),
    ],
)
def test_wrong_values_name_key_value_source_and_what_is_allowed(key: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError, match="wrong configuration") as raised:
        config(**{key: value})
    assert f"{key}={value!r} (argument {key}): must be {allowed}" in str(raised.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"local_cpu": False}, "local_cpu=False (argument local_cpu) and local_disk=None (default)"),
        (
            {"local_disk": "/kv", "max_local_disk_size": 0},
            "local_disk='/kv' (argument local_disk) and max_local_disk_size=0 (argument max_local_disk_size)",
        ),
        (
            {"blend_check_layers": [1, 5]},
            "blend_recompute_ratios=[0.15] (default) and blend_check_layers=[1, 5] (argument blend_check_layers)",
        ),
        ({"blend_check_layers": [5, 1], "blend_recompute_ratios": [0.2, 0.1]}, "layers must ascend"),
        ({"blend_check_layers": [1, 5], "blend_recompute_ratios": [0.1, 0.2]}, "ratios must not rise"),
        ({"blend_thresholds": [1.0, 2.0]}, "one threshold is needed for each layer"),
    ],
)
def test_contradictions_name_both_sides(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match="wrong configuration") as raised:
        config(**values)
    assert told in str(raised.value)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ValueError, match="wrong configuration") as raised:
        config(chunk_size=0, cache_policy="x", local_cpu="maybe")
    assert str(raised.value).count("must be") == 3
    with pytest.raises(ValueError, match="wrong configuration") as raised:
        config(local_cpu=False, blend_thresholds=[1.0, 2.0])
    assert "switch one of them on" in str(raised.value)
    assert "one threshold" in str(raised.value)


def test_equal_values_are_equal_wherever_they_came_from() -> None:
    environ = {"LMCACHE_CHUNK_SIZE": "128"}
    assert LMCacheEngineConfig.load(environ=environ) == config(chunk_size=128)
    assert config(chunk_size=128) != config()
    assert LMCacheEngineConfig.load(environ=environ).source_of("chunk_size") != config(chunk_size=128).source_of(
        "chunk_size"
    )


def test_environment_is_not_read_for_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "wrong")
    assert config() == LMCacheEngineConfig()
