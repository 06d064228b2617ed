"""The members of a running router, as whoever started it changes them: one question at a time, each with a deadline."""

from __future__ import annotations

import http.client
import json
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote, urlsplit

READY: Final = "ready"
ADMIN_KEY_VARIABLE: Final = "PREFILLSHARE_ADMIN_API_KEY"
"""Hands the router its administrator's key, for which a flag would be readable by every user of the machine."""

_ADDED: Final = (HTTPStatus.OK, HTTPStatus.CREATED)
_TIMEOUT_S: Final = 5.0


class RouterAdmin:
    """The administration of the router at `url`, whose admin key is `key`."""

    def __init__(self, url: str, key: str) -> None:
        self._address = urlsplit(url)
        self._key = key

    def admit(self, worker_url: str) -> str:
        """Have the worker among the members; `ready` if it gets requests now, else why not. To be asked again."""
        status, said = self._add(worker_url)
        if status not in _ADDED:
            return said if status is None else f"the router answered {status}: {said}"
        return READY if said["status"] == READY else f"it is {said['status']}: {said['reason']}"

    def add(self, worker_url: str) -> bool:
        """Have the worker among the members, ready or not; whether it is."""
        return self._add(worker_url)[0] in _ADDED

    def dismiss(self, worker_url: str) -> bool:
        """No new requests for the worker; whether those that were under way have ended. To be asked again.

        A module of the router's flags that nobody is left for goes with its last worker.
        """
        status, _ = self._ask("DELETE", f"/admin/workers?url={quote(worker_url, safe='')}&for_good=true")
        return status == HTTPStatus.NOT_FOUND

    def _add(self, worker_url: str) -> tuple[int | None, Any]:
        return self._ask("POST", "/admin/workers", {"url": worker_url})

    def _ask(self, method: str, path: str, body: Any = None) -> tuple[int | None, Any]:
        """Status and the answer, without a status what went wrong."""
        host = self._address.hostname
        assert host is not None
        connection = http.client.HTTPConnection(host, self._address.port, timeout=_TIMEOUT_S)
        try:
            connection.request(
                method,
                path,
                body=None if body is None else json.dumps(body),
                headers={"authorization": f"Bearer {self._key}"},
            )
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            return None, f"the router does not answer: {error or type(error).__name__}"
        finally:
            connection.close()
