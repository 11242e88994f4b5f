from __future__ import annotations

import pytest

from lmcache.config import LMCacheEngineConfig
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from tests.engine.helpers import CHUNK, PagesConnector, kv_of, make_config, make_metadata, tokens_of


@pytest.fixture
def builder():
    yield LMCacheEngineBuilder
    for name in ("a", "b"):
        LMCacheEngineBuilder.destroy(name)


def test_the_same_arguments_give_the_same_engine(builder):
    connector = PagesConnector()
    engine = builder.get_or_create("a", make_config(), make_metadata(), connector)
    assert builder.get_or_create("a", make_config(), make_metadata(), connector) is engine
    assert builder.get("a") is engine
    assert builder.get("b") is None


def test_where_a_value_came_from_does_not_matter(builder):
    engine = builder.get_or_create("a", make_config(), make_metadata())
    environ = {"LMCACHE_CHUNK_SIZE": str(CHUNK), "LMCACHE_MAX_LOCAL_CPU_SIZE": str(8 / 1024)}
    assert builder.get_or_create("a", LMCacheEngineConfig.load(environ=environ), make_metadata()) is engine


def test_a_connector_that_came_later_does_not_matter(builder):
    engine = builder.get_or_create("a", make_config(), make_metadata())
    engine.set_gpu_connector(PagesConnector())
    assert builder.get_or_create("a", make_config(), make_metadata()) is engine


@pytest.mark.parametrize(
    ("differing", "arguments"),
    [
        ("config", (make_config(save_unfull_chunk=True), make_metadata(), None)),
        ("metadata", (make_config(), make_metadata(model_name="other"), None)),
        ("gpu_connector", (make_config(), make_metadata(), PagesConnector())),
    ],
)
def test_other_arguments_for_a_live_engine_are_refused(builder, differing, arguments):
    engine = builder.get_or_create("a", make_config(), make_metadata())
    with pytest.raises(ValueError, match=f"engine 'a' exists and was built with another {differing}"):
        builder.get_or_create("a", *arguments)
    assert builder.get("a") is engine


def test_names_do_not_share(builder):
    tokens = tokens_of(CHUNK)
    first = builder.get_or_create("a", make_config(), make_metadata())
    second = builder.get_or_create("b", make_config(), make_metadata())
    first.store(tokens, kv_of(tokens))
    assert not second.contains(tokens)


def test_destroy_closes(builder):
    tokens = tokens_of(CHUNK)
    engine = builder.get_or_create("a", make_config(), make_metadata())
    engine.store(tokens, kv_of(tokens))
    builder.destroy("a")
    builder.destroy("a")
    assert builder.get("a") is None
    assert engine.lookup(tokens) == 0
    assert builder.get_or_create("a", make_config(save_unfull_chunk=True), make_metadata()) is not engine


def test_a_failed_start_leaves_the_name_free(builder):
    with pytest.raises(ValueError, match="chunk_size"):
        builder.get_or_create("a", make_config(chunk_size=32), make_metadata())
    assert builder.get("a") is None
    builder.get_or_create("a", make_config(), make_metadata())
