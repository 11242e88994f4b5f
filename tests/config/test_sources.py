"""Which source wins, what it is called, and what happens to names that nobody knows."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lmcache.config import LMCacheEngineConfig


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "lmcache.yaml"
    path.write_text("chunk_size: 16\nmin_retrieve_tokens: 16\nblend_min_tokens: 16\n", encoding="utf-8")
    return path


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_later_sources_win_and_are_remembered(yaml_file: Path) -> None:
    config = LMCacheEngineConfig.load(
        environ={
            "LMCACHE_CONFIG_FILE": str(yaml_file),
            "LMCACHE_MIN_RETRIEVE_TOKENS": "32",
            "LMCACHE_BLEND_MIN_TOKENS": "32",
        },
        engine_overrides={"lmcache.blend_min_tokens": 64, "kv_connector_setting": 1},
    )
    assert (config.chunk_size, config.min_retrieve_tokens, config.blend_min_tokens) == (16, 32, 64)
    assert config.source_of("chunk_size") == f"YAML file {yaml_file}"
    assert config.source_of("min_retrieve_tokens") == "environment variable LMCACHE_MIN_RETRIEVE_TOKENS"
    assert config.source_of("blend_min_tokens") == "kv_connector_extra_config entry lmcache.blend_min_tokens"
    assert config.source_of("local_cpu") == "default"


def test_a_wrong_value_that_is_replaced_does_no_harm(yaml_file: Path) -> None:
    yaml_file.write_text("chunk_size: wrong\n", encoding="utf-8")
    environ = {"LMCACHE_CONFIG_FILE": str(yaml_file), "LMCACHE_CHUNK_SIZE": "32"}
    assert LMCacheEngineConfig.load(environ=environ).chunk_size == 32


def test_errors_name_the_source_of_each_value(yaml_file: Path) -> None:
    yaml_file.write_text("chunk_size: many\n", encoding="utf-8")
    with pytest.raises(ValueError, match="wrong configuration") as raised:
        LMCacheEngineConfig.load(
            environ={"LMCACHE_CONFIG_FILE": str(yaml_file), "LMCACHE_LOCAL_CPU": "maybe"},
            engine_overrides={"lmcache.cache_policy": "MRU"},
        )
    message = str(raised.value)
    assert f"chunk_size='many' (YAML file {yaml_file}): must be" in message
    assert "local_cpu='maybe' (environment variable LMCACHE_LOCAL_CPU): must be" in message
    assert "cache_policy='MRU' (kv_connector_extra_config entry lmcache.cache_policy): must be" in message


def test_from_env_reads_the_process_environment(yaml_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(yaml_file))
    monkeypatch.setenv("LMCACHE_LOCAL_CPU", "True")
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "5")
    config = LMCacheEngineConfig.from_env()
    assert (config.chunk_size, config.local_cpu, config.max_local_cpu_size) == (16, True, 5.0)


def test_from_file_reads_only_the_file(yaml_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_MIN_RETRIEVE_TOKENS", "99")
    assert LMCacheEngineConfig.from_file(yaml_file).min_retrieve_tokens == 16


def test_an_empty_variable_counts_as_not_set() -> None:
    assert LMCacheEngineConfig.load(environ={"LMCACHE_CHUNK_SIZE": ""}) == LMCacheEngineConfig.from_defaults()


def test_the_disk_of_a_file_can_be_switched_off(yaml_file: Path) -> None:
    yaml_file.write_text("local_disk: /var/kv\n", encoding="utf-8")
    environ = {"LMCACHE_CONFIG_FILE": str(yaml_file), "LMCACHE_LOCAL_DISK": "none"}
    assert LMCacheEngineConfig.load(environ=environ).local_disk is None


def test_json_in_the_environment() -> None:
    environ = {"LMCACHE_EXTRA_CONFIG": '{"a": [1]}', "LMCACHE_BLEND_THRESHOLDS": "[0.5]"}
    config = LMCacheEngineConfig.load(environ=environ)
    assert config.extra_config == {"a": [1]}
    assert config.blend_thresholds == (0.5,)


def test_an_empty_file_says_nothing(yaml_file: Path) -> None:
    yaml_file.write_text("# nothing\n", encoding="utf-8")
    assert LMCacheEngineConfig.from_file(yaml_file) == LMCacheEngineConfig.from_defaults()


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"chunk_size: [1\n", b"\xff\xfe\x00", b"text"])
def test_a_file_that_is_no_configuration(yaml_file: Path, content: bytes) -> None:
    yaml_file.write_bytes(content)
    with pytest.raises(ValueError, match=f"YAML file {yaml_file}"):
        LMCacheEngineConfig.from_file(yaml_file)


def test_yaml_is_never_evaluated(yaml_file: Path) -> None:
    yaml_file.write_text("extra_config: !!python/object/apply:os.getcwd []\n", encoding="utf-8")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        LMCacheEngineConfig.from_file(yaml_file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"YAML file .*absent\.yaml cannot be read"):
        LMCacheEngineConfig.load(environ={"LMCACHE_CONFIG_FILE": str(tmp_path / "absent.yaml")})


def test_unknown_names_are_warned_about_as_they_are_written(yaml_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    yaml_file.write_text("chunk_sizes: 8\n1: 2\n", encoding="utf-8")
    config = LMCacheEngineConfig.load(
        environ={"LMCACHE_CONFIG_FILE": str(yaml_file), "LMCACHE_LOCAL_DISC": "/kv", "OTHER": "1"},
        engine_overrides={"lmcache.cache_polices": "LRU", "unrelated": 1},
    )
    assert config == LMCacheEngineConfig.from_defaults()
    assert warnings(caplog) == [
        f"YAML file {yaml_file}: chunk_sizes is unknown and ignored; did you mean chunk_size?",
        f"YAML file {yaml_file}: 1 is unknown and ignored; `lmcache config` lists the known ones",
        "environment variable: LMCACHE_LOCAL_DISC is unknown and ignored; did you mean LMCACHE_LOCAL_DISK?",
        "kv_connector_extra_config: lmcache.cache_polices is unknown and ignored; did you mean lmcache.cache_policy?",
    ]


def test_a_keyword_that_nobody_knows_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    LMCacheEngineConfig.from_defaults(chunksize=8)
    assert warnings(caplog) == ["argument: chunksize is unknown and ignored; did you mean chunk_size?"]


def test_variables_read_elsewhere_are_no_keys(caplog: pytest.LogCaptureFixture) -> None:
    LMCacheEngineConfig.load(environ={"LMCACHE_LOG_LEVEL": "DEBUG"})
    assert warnings(caplog) == []


def test_a_forgotten_prefix_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    """vLLM itself reads `use_layerwise` without the prefix, so having both is right."""
    config = LMCacheEngineConfig.load(
        environ={}, engine_overrides={"chunk_size": 8, "use_layerwise": True, "lmcache.use_layerwise": True}
    )
    assert config.chunk_size == 256
    assert config.use_layerwise
    assert warnings(caplog) == [
        "kv_connector_extra_config: chunk_size does not reach LMCache without its prefix; write lmcache.chunk_size"
    ]
