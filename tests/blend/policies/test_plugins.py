"""How names become classes."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from lmcache.blend.plugins import PluginRegistry
from lmcache.blend.policies.interface import SelectionPolicy
from lmcache.blend.policies.none import NonePolicy
from lmcache.blend.policies.sink import SinkPolicy
from tests.blend.policies.third_party import LastTokensPolicy

GROUP = "tests.policies"
HERE = "tests.blend.policies.third_party"


@pytest.fixture
def registry() -> PluginRegistry[SelectionPolicy]:
    return PluginRegistry("policy", GROUP, SelectionPolicy, [SinkPolicy, NonePolicy])


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    def install(**values: str) -> None:
        points = [EntryPoint(name.rstrip("2"), value, GROUP) for name, value in values.items()]
        monkeypatch.setattr("lmcache.blend.plugins.entry_points", lambda group: points if group == GROUP else [])

    return install


def test_ours_come_first_in_their_order_then_the_others_by_name(registry, install) -> None:
    install(zebra=f"{HERE}:LastTokensPolicy", ape="nowhere:Nothing")
    assert registry.names() == ["sink", "none", "ape", "zebra"]


@pytest.mark.parametrize("name", ["last_tokens", "Last-Tokens", " LAST_TOKENS "])
def test_spellings_of_a_name(registry, install, name: str) -> None:
    install(last_tokens=f"{HERE}:LastTokensPolicy")
    assert isinstance(registry.make(name), LastTokensPolicy)


def test_options_reach_the_constructor(registry) -> None:
    assert registry.make("sink", k=3)._tokens == 3


def test_ours_cannot_be_replaced(registry, install) -> None:
    install(sink=f"{HERE}:LastTokensPolicy")
    assert isinstance(registry.make("sink"), SinkPolicy)
    assert registry.names() == ["sink", "none"]


def test_a_broken_one_does_not_keep_others_from_use(registry, install) -> None:
    install(broken="nowhere:Nothing", last_tokens=f"{HERE}:LastTokensPolicy")
    assert isinstance(registry.make("last_tokens"), LastTokensPolicy)


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (
            {"wanted": "nowhere:Nothing"},
            "policy 'wanted': nowhere:Nothing cannot be imported: No module named 'nowhere'",
        ),
        ({"wanted": f"{HERE}:Nothing"}, "cannot be imported: .*has no attribute 'Nothing'"),
        ({"wanted": f"{HERE}:NoPolicy"}, "third_party:NoPolicy is not a subclass of SelectionPolicy"),
        ({"wanted": f"{HERE}:torch"}, "third_party:torch is not a subclass of SelectionPolicy"),
        (
            {"wanted": f"{HERE}:LastTokensPolicy", "wanted2": f"{HERE}:NoPolicy"},
            "policy 'wanted' is installed twice, as .*:LastTokensPolicy and .*:NoPolicy: uninstall one",
        ),
        ({}, "unknown policy 'wanted': must be one of sink, none"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(registry, install, installed: dict[str, str], message: str) -> None:
    install(**installed)
    with pytest.raises(ValueError, match=message):
        registry.make("wanted")


def test_seen_twice_on_the_path_is_not_installed_twice(registry, install) -> None:
    install(last_tokens=f"{HERE}:LastTokensPolicy", last_tokens2=f"{HERE}:LastTokensPolicy")
    assert isinstance(registry.make("last_tokens"), LastTokensPolicy)
