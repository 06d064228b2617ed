"""Who is a member: addresses, where they come from, and what changes when a source says something new. Pure values.

A source gives addresses and nothing else, since a worker says of itself what it is. Only the addresses that the
router's own flags name come with what must be found there. `sources` reads them, `roster` acts on the changes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.parsing import parse_yaml
from sglang_prefillshare.protocol import Role

STATIC: Final = "static"
"""The source of the members that flags name."""
ADMIN: Final = "admin"
"""The source of those that an administrator added."""

_NOT_IN_NAMES: Final = re.compile(r"[\x00-\x20\x7f?#%]")
MODULE_NAME_RULE: Final = (
    "it stands in URL paths (/m/<model>/...). Use the served model name, without blanks, '?', '#' or '%'."
)


def is_module_name(name: Any) -> bool:
    """Whether a decode module can be called so."""
    return isinstance(name, str) and bool(name) and name == name.strip() and not _NOT_IN_NAMES.search(name)


def checked_url(url: Any, owner: str) -> str:
    """A worker's address without a trailing slash. Raises `ConfigError`, in which `owner` says who gave it."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for a port that is no number or out of range
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{owner}: {url!r} is not a URL ({error}). Write it as http://host:port.") from error
    if not isinstance(url, str) or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{owner}: {url!r} is not a URL. Write it as http://host:port.")
    if parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(f"{owner}: {url!r} has a query, fragment or user name. Write it as http://host:port.")
    return url.rstrip("/")


@dataclass(frozen=True, slots=True)
class Member:
    """An address, and what the configuration wants to find there; without a `role` the worker says what it is."""

    url: str
    role: Role | None = None
    modules: tuple[str, ...] = ()


# -- sources


@dataclass(frozen=True, slots=True)
class FileSource:
    """A YAML file that lists addresses; see `parse_members`."""

    path: str

    def __str__(self) -> str:
        return f"file:{self.path}"


@dataclass(frozen=True, slots=True)
class DnsSource:
    """All addresses that a name has, each with a worker at `port`."""

    name: str
    port: int

    def __str__(self) -> str:
        return f"dns:{self.name}:{self.port}"


SourceSpec = FileSource | DnsSource


def parse_source(text: str) -> SourceSpec:
    """`file:PATH` or `dns:NAME:PORT`, as `--workers` has it. Raises `ConfigError`."""
    kind, _, rest = text.partition(":")
    wanted = "wanted file:PATH or dns:NAME:PORT, such as dns:prefillshare-workers:30000"
    if kind == "kubernetes":
        raise ConfigError(
            f"--workers is {text!r}, and workers cannot be read from the Kubernetes API yet. Name a headless service "
            "of theirs, as dns:SERVICE.NAMESPACE:PORT, or a file."
        )
    if kind == "file" and rest:
        return FileSource(rest)
    if kind == "dns":
        name, _, port = rest.rpartition(":")
        if (
            not name
            or _NOT_IN_NAMES.search(name)
            or not (port.isascii() and port.isdigit())
            or not 0 < int(port) <= 65535
        ):
            raise ConfigError(f"--workers is {text!r}, {wanted}: a name, and a port from 1 to 65535.")
        return DnsSource(name, int(port))
    raise ConfigError(f"--workers is {text!r}, {wanted}.")


class _MembersFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    workers: list[str]


def parse_members(text: str, *, source: str) -> tuple[str, ...]:
    """The addresses in a YAML file, `workers: [http://host:port, ...]`, in their order.

    Raises `ConfigError` for one that cannot be used. A file that names nobody is one: it is likelier to be half
    written, or written by a program that failed, than meant.
    """
    found = parse_yaml(text, _MembersFile, source=source, what="list of workers")
    urls = [checked_url(url, source) for url in found.workers]
    if not urls:
        raise ConfigError(f"{source} names no worker, wanted one URL at least under workers.")
    twice = next((url for url in urls if urls.count(url) > 1), None)
    if twice is not None:
        raise ConfigError(f"{source}: {twice} is named twice. Keep one.")
    return tuple(urls)


def member_urls(addresses: Collection[str], port: int) -> tuple[str, ...]:
    """URLs of the addresses that a name resolved to, each once, in an order that does not change.

    Addresses that only count on one network interface (`fe80::1%eth0`) are left out.
    """
    usable = sorted({address for address in addresses if "%" not in address})
    return tuple(f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}" for address in usable)


# -- changes


@dataclass(frozen=True, slots=True)
class Changes:
    """From one set of members to another, in the order of the sources."""

    joined: tuple[Member, ...]
    left: tuple[str, ...]


def wanted_members(sources: Mapping[str, Sequence[Member]], *, removed: Collection[str] = ()) -> dict[str, Member]:
    """Everybody that a source names and nobody `removed`, by URL. Of two that name one URL the first counts that says
    what must be there."""
    wanted: dict[str, Member] = {}
    for members in sources.values():
        for member in members:
            known = wanted.get(member.url)
            if member.url not in removed and (known is None or known.role is None):
                wanted[member.url] = member
    return wanted


def changes(now: Collection[str], wanted: Mapping[str, Member]) -> Changes:
    """What makes the `wanted` members of those there are `now`."""
    return Changes(
        joined=tuple(member for url, member in wanted.items() if url not in now),
        left=tuple(url for url in now if url not in wanted),
    )
