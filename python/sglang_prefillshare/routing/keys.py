"""The keys of the router's clients: a file of names and hashes, and the gate in front of the endpoints.

A key is 256 random bits, so one SHA-256 of it can stand in a file: there is nothing to guess. The key itself is shown
once, to whoever adds it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.routing import _json
from sglang_prefillshare.routing.answers import error_for_path

logger = logging.getLogger(__name__)

KEY_PREFIX: Final = "pshare-"
CALLER_SCOPE: Final = "prefillshare.caller"
"""Where the gate leaves the name of the key in an ASGI scope."""

OPEN_PATHS: Final = frozenset({"/livez", "/readyz", "/health"})
"""What probes ask, and no more: no key is needed there."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_RELOAD_INTERVAL_S: Final = 1.0
_BROWSERS: Final = b'Basic realm="prefillshare: any name, and a key of yours as the password", charset="UTF-8"'
"""Has a browser ask its user, and show what it was told to all that the page asks for."""


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def parse_keys(text: str, *, source: str) -> dict[str, str]:
    """Digests by name. One `name:sha256` a line; empty lines and lines that begin with # say nothing.

    Raises `ConfigError`, naming the line, for anything else. What a line holds is not repeated: it could be a key.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, digest = line.partition(":")
        name, digest = name.strip(), digest.strip()
        if not colon or not _NAME.fullmatch(name) or not _DIGEST.fullmatch(digest):
            raise ConfigError(
                f"{source}:{number}: not a key's line, wanted NAME:SHA256 with 64 hexadecimal digits. "
                "Add keys with `prefillshare keys add NAME --file PATH`."
            )
        if name in found:
            raise ConfigError(f"{source}:{number}: the key {name!r} is there twice. Remove one of the lines.")
        found[name] = digest
    return found


def add_key(path: Path, name: str) -> str:
    """Append a new key under `name` to the file, which is made (for its owner alone) if there is none.

    Returns the key, which is stored nowhere. Raises `ConfigError` for a name that is no name, or is taken.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a key, wanted up to 64 letters, digits, '.', '_' or '-'.")
    try:
        text = path.read_text() if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    if name in parse_keys(text, source=str(path)):
        raise ConfigError(f"{path} has a key {name!r} already. Choose another name, or remove its line.")
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    line = f"{'' if not text or text.endswith(chr(10)) else chr(10)}{name}:{digest_of(key)}\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(line)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
    return key


class KeyFile:
    """The keys in a file, read again when it has changed; one that cannot be read leaves the last good keys in force.

    Raises `ConfigError` if it cannot be read, or holds no key, when the router starts.
    """

    def __init__(self, path: Path, *, now: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._now = now
        self._seen = self._state()
        self._digests: Mapping[str, str] = self._read()
        self._looked_at = now()
        if not self._digests:
            raise ConfigError(
                f"{path} holds no key, so nobody could ask. Add one: `prefillshare keys add NAME --file {path}`."
            )

    def name_of(self, key: str) -> str | None:
        """The name under which `key` is known; None for an unknown one. Takes as long for either."""
        self._refresh()
        given, found = digest_of(key), None
        for name, digest in self._digests.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found

    def _refresh(self) -> None:
        now = self._now()
        if now - self._looked_at < _RELOAD_INTERVAL_S:
            return
        self._looked_at = now
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        try:
            digests = self._read()
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)
            return
        logger.info("read %d keys from %s", len(digests), self._path)
        self._digests = digests

    def _read(self) -> dict[str, str]:
        try:
            text = self._path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the keys in {self._path} cannot be read: {error}.") from error
        return parse_keys(text, source=str(self._path))

    def _state(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def key_in(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The key that a request carries: `Authorization: Bearer KEY`, or `x-api-key: KEY`, as Anthropic's clients send, or
    as the password that a browser asked for."""
    by_name = dict(headers)
    scheme, _, key = by_name.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(key, validate=True).decode("latin-1").partition(":")[2] or None
        except ValueError:
            return None
    other = by_name.get(b"x-api-key")
    return None if other is None else other.decode("latin-1").strip()


class KeyGate:
    """An ASGI app in front of another: lets requests with a known key through, all others to the open paths only.

    Nothing of an answer passes through it.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyFile) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        key = key_in(scope["headers"])
        name = None if key is None else self._keys.name_of(key)
        if name is None:
            await _refuse(scope["path"], is_missing=key is None, send=send)
            return
        await self._app({**scope, CALLER_SCOPE: name}, receive, send)


def is_open(path: str) -> bool:
    """Whether a path may be asked without a client's key: the probes', of the router and of one module, and the
    administrator's, who has a key of another kind."""
    return (
        path in OPEN_PATHS
        or path in ("/modules", "/flush_cache")
        or path.startswith(("/admin/", "/modules/"))
        or (path.startswith("/m/") and path.endswith(("/health", "/flush_cache")))
    )


async def _refuse(path: str, *, is_missing: bool, send: Send) -> None:
    message = (
        "The request carries no API key. Send it as Authorization: Bearer KEY, or as x-api-key: KEY."
        if is_missing
        else "The API key is not known here."
    )
    body = _json.dumps(error_for_path(path, 401, message, kind="authentication_error"))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"www-authenticate", _BROWSERS if path == "/ui" or path.startswith("/ui/") else b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
