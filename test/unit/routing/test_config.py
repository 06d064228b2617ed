"""What the router refuses to start with."""

import pytest

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.protocol import Role
from sglang_prefillshare.routing.config import PolicyConfig, RouterConfig
from sglang_prefillshare.routing.membership import DnsSource, Member

GOOD = {"prefill": ["http://h:1/"], "decode": {"planner": ["http://h:2"]}}


def test_urls_are_normalised_and_everything_is_frozen():
    config = RouterConfig(**GOOD)
    assert config.prefill == ("http://h:1",)
    assert config.decode["planner"] == ("http://h:2",)
    with pytest.raises(TypeError):
        config.decode["coder"] = ()
    with pytest.raises(AttributeError):
        config.port = 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prefill": []}, "No prefill worker"),
        ({"prefill": "http://h:1"}, "list of URLs"),
        ({"decode": {}}, "No decode module"),
        ({"decode": {"planner": []}}, "'planner' has no worker"),
        ({"decode": {"planner": "http://h:2"}}, "list of URLs"),
        ({"decode": {"": ["http://h:2"]}}, "cannot name"),
        ({"decode": {"a b": ["http://h:2"]}}, "cannot name"),
        ({"decode": {"a?": ["http://h:2"]}}, "cannot name"),
        ({"decode": {"planner": ["http://h:1"]}}, "named twice"),
        ({"decode": {"planner": ["http://h:2", "http://h:2/"]}}, "named twice"),
        ({"prefill": ["h:1"]}, "http://host:port"),
        ({"prefill": ["ftp://h:1"]}, "http://host:port"),
        ({"prefill": ["http://"]}, "http://host:port"),
        ({"prefill": ["http://h:99999"]}, "http://host:port"),
        ({"prefill": ["http://u:p@h:1"]}, "user name"),
        ({"prefill": [None]}, "http://host:port"),
        ({"port": 70000}, "port"),
        ({"poll_interval_s": 0}, "poll_interval_s"),
        ({"request_timeout_s": float("inf")}, "request_timeout_s"),
        ({"stop_grace_s": -1}, "stop_grace_s"),
        ({"call_log_size": 0}, "call_log_size"),
        ({"drain_deadline_s": 0}, "drain_deadline_s"),
        ({"admin_api_key": ""}, "admin API key is empty"),
        ({"sources": [DnsSource("a", 1), DnsSource("a", 1)]}, "dns:a:1 is given twice"),
    ],
)
def test_what_cannot_work_is_named(change, says):
    with pytest.raises(ConfigError, match=says):
        RouterConfig(**(GOOD | change))


@pytest.mark.parametrize("more", [{"sources": [DnsSource("workers", 1)]}, {"admin_api_key": "k"}])
def test_workers_may_be_named_later(more):
    config = RouterConfig(**more)
    assert config.prefill == () and dict(config.decode) == {} and config.members == ()


def test_members_are_the_workers_that_are_named_each_once():
    config = RouterConfig(prefill=["http://p/"], decode={"planner": ["http://d"], "coder": ["http://d", "http://e"]})
    assert config.members == (
        Member("http://p", Role.PREFILL),
        Member("http://d", Role.DECODE, ("planner", "coder")),
        Member("http://e", Role.DECODE, ("coder",)),
    )


def test_several_modules_may_share_a_decode_worker():
    config = RouterConfig(**(GOOD | {"decode": {"planner": ["http://h:2"], "coder": ["http://h:2", "http://h:3"]}}))
    assert dict(config.decode) == {"planner": ("http://h:2",), "coder": ("http://h:2", "http://h:3")}


@pytest.mark.parametrize(
    "change",
    [
        {"load_margin_tokens": -1},
        {"load_margin_requests": -1},
        {"load_margin_ratio": 0.5},
        {"min_prefix_tokens": 0},
        {"home_margin": -1},
    ],
)
def test_policy_margins_are_checked(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        PolicyConfig(**change)


def test_the_key_is_not_shown():
    assert "sesame" not in repr(RouterConfig(**GOOD, worker_api_key="sesame", admin_api_key="sesame"))
