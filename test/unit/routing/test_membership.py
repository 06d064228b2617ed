"""Who should be a member, given what the sources say: parsing, and what changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.protocol import Role
from sglang_prefillshare.routing.membership import (
    DnsSource,
    FileSource,
    Member,
    changes,
    checked_url,
    is_module_name,
    member_urls,
    parse_members,
    parse_source,
    wanted_members,
)


def test_sources_are_parsed():
    assert parse_source("file:/etc/a:b.yaml") == FileSource("/etc/a:b.yaml")
    assert parse_source("dns:prefill.ns:30000") == DnsSource("prefill.ns", 30000)
    for text in ("file:workers.yaml", "dns:prefill.ns:30000"):
        assert str(parse_source(text)) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kubernetes:default/app=x", "dns:SERVICE.NAMESPACE:PORT"),
        ("workers.yaml", "wanted file:PATH or dns:NAME:PORT"),
        ("file:", "wanted file:PATH"),
        ("dns:prefill", "a port from 1 to 65535"),
        ("dns:a b:30000", "a port from 1 to 65535"),
        ("dns::30000", "a port from 1 to 65535"),
        ("dns:prefill:0", "a port from 1 to 65535"),
        ("dns:prefill:65536", "a port from 1 to 65535"),
        ("dns:prefill:x", "a port from 1 to 65535"),
        ("dns:prefill:²", "a port from 1 to 65535"),
        ("consul:x", "wanted file:PATH"),
        ("", "wanted file:PATH"),
    ],
)
def test_a_source_that_there_is_not_is_named_with_what_to_write(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_source(text)


def test_a_file_lists_addresses():
    text = "workers:\n  - http://a:1/\n  - https://b:2/x\n  - http://[::1]:3\n"
    assert parse_members(text, source="f") == ("http://a:1", "https://b:2/x", "http://[::1]:3")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "f is empty"),
        ("workers: []", "names no worker"),
        ("[http://a:1]", "wanted the keys"),
        ("workers: http://a:1", "wanted a list"),
        ("workers: [5]", "wanted text"),
        ("workers: [a:1]", "http://host:port"),
        ("workers: [http://a:1, http://a:1/]", "named twice"),
        ("worker: [http://a:1]", "Did you mean workers"),
        ("workers:\n  - http://a:1\n - x", "f:"),
        ("workers: [http://u:p@a:1]", "user name"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_members(text, source="f")


def test_addresses_become_urls_in_one_order():
    assert member_urls(["10.0.0.2", "fe80::1%eth0", "10.0.0.1", "::1", "10.0.0.2"], 5) == (
        "http://10.0.0.1:5",
        "http://10.0.0.2:5",
        "http://[::1]:5",
    )


@pytest.mark.parametrize("url", [None, 5, "", "h:1", "ftp://h:1", "http://", "http://h:x", "http://h:1?a", "http://["])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="http://host:port"):
        checked_url(url, "url")


@pytest.mark.parametrize("name", ["", " a", "a b", "a?", "a#", "a%20", "a\n", None, 5])
def test_what_cannot_stand_in_a_path_names_no_module(name):
    assert not is_module_name(name)
    assert is_module_name("org/coder-7b")


def test_what_the_configuration_wants_of_an_address_counts():
    wanted = wanted_members(
        {"file": [Member("a"), Member("b")], "static": [Member("b", Role.PREFILL)], "dns": [Member("b"), Member("c")]},
        removed={"c"},
    )
    assert wanted == {"a": Member("a"), "b": Member("b", Role.PREFILL)}


URLS = st.lists(st.sampled_from("abcdefgh"), unique=True)


@given(now=URLS, sources=st.dictionaries(st.sampled_from("xyz"), URLS), removed=st.sets(st.sampled_from("abcdefgh")))
def test_changes_make_the_wanted_members_of_those_that_there_are(now, sources, removed):
    named = {name: [Member(url) for url in urls] for name, urls in sources.items()}
    wanted = wanted_members(named, removed=removed)
    found = changes(now, wanted)
    joined = [member.url for member in found.joined]
    assert set(wanted) == {url for urls in sources.values() for url in urls} - removed
    assert not set(joined) & set(now) and set(found.left) <= set(now)
    assert (set(now) - set(found.left)) | set(joined) == set(wanted)
    assert len(set(joined)) == len(joined)
