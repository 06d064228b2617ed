"""How this machine reaches registries of packages, for the steps of an image. None of it is left in the image."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

DEFAULT_MIRROR = "http://deb.debian.org/debian"

_PIP = frozenset(
    {"cert", "client-cert", "constraint", "extra-index-url", "find-links", "index-url", "no-index", "proxy", "timeout"}
    | {"trusted-host"}
)
_CERTIFICATES = frozenset({"CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE"})
_NAMES = ("/etc/resolv.conf", "/etc/hosts")


def environment() -> dict[str, str]:
    """Proxies, certificates and pip's settings: variables of this process, and what pip's files say."""
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    certificates = {name: os.environ[name] for name in _CERTIFICATES if name in os.environ}
    return proxies | certificates | _pip_settings()


def local_paths(env: Mapping[str, str]) -> list[Path]:
    """What of this machine's disk a room needs to use such an environment.

    Of a package index that is a folder it is the one above: the index's pages lead there.
    """
    found = dict.fromkeys(Path(name) for name in _NAMES)
    for name, value in env.items():
        if not name.startswith("PIP_") and name not in _CERTIFICATES:
            continue
        for word in value.split():
            path = Path(urllib.parse.urlparse(word).path if word.startswith("file:") else word)
            found[path.parent if "INDEX_URL" in name else path] = None
    return [path for path in found if path.is_absolute() and path.exists()]


def apt_settings() -> str:
    """What apt is told here about fetching, as a file for `apt.conf.d`."""
    dumped = _output(["apt-config", "dump"]).splitlines()
    return "".join(f"{line}\n" for line in dumped if line.startswith("Acquire::"))


def debian_mirror(suite: str) -> str:
    """Where this machine's apt has this suite from, or else where anyone has it from."""
    for line in _output(["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)"]).splitlines():
        uri, *codename = line.split()
        if codename == [suite]:
            return uri
    return DEFAULT_MIRROR


def _pip_settings() -> dict[str, str]:
    lines = _output([sys.executable, "-m", "pip", "config", "list"]).splitlines()
    found = {}
    for section in ("global.", "install.", ":env:."):  # later ones win
        for line in lines:
            name, _, value = line.partition("=")
            option = name.removeprefix(section).replace("_", "-")
            if name.startswith(section) and option in _PIP:
                found[f"PIP_{option.upper().replace('-', '_')}"] = str(ast.literal_eval(value))
    return found


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return ""
