"""Reading the sources of members: a file that is watched, a name that is resolved again and again."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.membership import DnsSource, FileSource, SourceSpec, member_urls, parse_members

MAX_FILE_BYTES: Final = 1024 * 1024
RESOLVE_TIMEOUT_S: Final = 10.0

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""From a name and a port to addresses; raises `OSError` where there is none."""


class Reader(Protocol):
    """One source. What `read` raises, a `ConfigError`, is no reason to change anything: the last set counts on."""

    interval_s: float

    async def read(self) -> Sequence[str] | None:
        """The addresses that it names now; `None` if nothing changed since the last time."""


class FileReader:
    """Reads the file again when it has another time, size or inode: whoever writes it renames a new one into place."""

    def __init__(self, path: Path, *, interval_s: float) -> None:
        self.interval_s = interval_s
        self._path = path
        self._stamp: tuple[int, int, int] | None = None

    async def read(self) -> Sequence[str] | None:
        return await asyncio.to_thread(self._read)

    def _read(self) -> Sequence[str] | None:
        try:
            found = self._path.stat()
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            if stamp == self._stamp:
                return None
            self._stamp = stamp
            return read_members(self._path)
        except OSError as error:
            self._stamp = None  # it may come back as it was
            raise ConfigError(f"cannot read {self._path}: {error.strerror}.") from error


class DnsReader:
    """Resolves the name each time; one that does not resolve, or to nobody, is a failure."""

    def __init__(self, source: DnsSource, *, interval_s: float, resolve: Resolve | None = None) -> None:
        self.interval_s = interval_s
        self._source = source
        self._resolve = resolve or _resolve

    async def read(self) -> Sequence[str] | None:
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT_S):
                addresses = await self._resolve(self._source.name, self._source.port)
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError; UnicodeError: no name can be so long
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ConfigError(f"the name {self._source.name} does not resolve: {why}.") from error
        urls = member_urls(addresses, self._source.port)
        if not urls:
            raise ConfigError(f"the name {self._source.name} has no address that can be used.")
        return urls


def reader_of(source: SourceSpec, config: RouterConfig) -> Reader:
    """What reads `source`."""
    if isinstance(source, FileSource):
        return FileReader(Path(source.path), interval_s=config.poll_interval_s)
    return DnsReader(source, interval_s=config.resolve_interval_s)


def check_sources(sources: Sequence[SourceSpec]) -> None:
    """Before anything is started: a file that cannot be used raises `ConfigError`. A name may come to be later."""
    for source in sources:
        if isinstance(source, FileSource):
            try:
                read_members(Path(source.path))
            except OSError as error:
                raise ConfigError(f"cannot read {source}: {error.strerror}. Write it, or name another.") from error


def read_members(path: Path) -> tuple[str, ...]:
    """The addresses in a file. Raises `OSError`, or `ConfigError` for what it holds."""
    with contextlib.closing(path.open("rb")) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has over {MAX_FILE_BYTES} bytes, wanted a list of workers.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text, wanted YAML: {error.reason}.") from error
    return parse_members(text, source=str(path))


async def _resolve(name: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]
