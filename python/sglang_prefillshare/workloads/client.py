"""One call of one agent over HTTP, timed: `/generate` with token ids, streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from sglang_prefillshare.routing import _json
from sglang_prefillshare.routing.request import SESSION_HEADER

_DATA: Final = b"data:"
_DONE: Final = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. Times in seconds; `arrivals_s` has a time, since the request was sent, for every chunk, with the
    tokens that it brought. `error` is None if all of it came."""

    token_ids: tuple[int, ...] = field(repr=False)
    cached_tokens: int | None
    ttft_s: float | None
    e2e_s: float
    arrivals_s: tuple[tuple[float, int], ...] = field(default=(), repr=False)
    error: str | None = None
    is_timeout: bool = False

    @property
    def itls_s(self) -> list[float]:
        """Between tokens: a chunk of several shares its time out among them, as SGLang's benchmark does."""
        gaps = []
        for (before, _), (at, count) in zip(self.arrivals_s, self.arrivals_s[1:], strict=False):
            gaps += [(at - before) / count] * count
        return gaps


async def ask(
    client: aiohttp.ClientSession,
    url: str,
    *,
    agent: str,
    is_adapter: bool = False,
    session: str,
    prompt: Sequence[int],
    answer_tokens: int,
    timeout_s: float,
) -> Answer:
    """Ask for just `answer_tokens` greedy tokens, of an adapter by SGLang's name for it.

    The answer says what failed; only `CancelledError` is raised.
    """
    body = _json.dumps(
        {
            "model": agent,
            **({"lora_path": agent} if is_adapter else {}),
            "input_ids": list(prompt),
            "sampling_params": {"temperature": 0, "max_new_tokens": answer_tokens, "ignore_eos": True},
            "stream": True,
        }
    )
    headers = {"content-type": "application/json", SESSION_HEADER: session}
    reader = _Reader()
    started = time.perf_counter()
    error: str | None = None
    is_timeout = False
    try:
        async with (
            asyncio.timeout(timeout_s),
            client.post(f"{url}/generate", data=body, headers=headers) as response,
        ):
            if response.status != 200:
                error = f"{response.status}: {(await response.text())[:500]}"
            else:
                async for line in response.content:
                    reader.feed(line, time.perf_counter() - started)
    except TimeoutError:
        error, is_timeout = f"no whole answer within {timeout_s:g} s", True
    except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    elapsed = time.perf_counter() - started
    error = error or reader.complaint(len(prompt), answer_tokens)
    return Answer(
        token_ids=tuple(reader.token_ids),
        cached_tokens=reader.cached_tokens,
        ttft_s=reader.arrivals_s[0][0] if reader.arrivals_s else None,
        e2e_s=elapsed,
        arrivals_s=tuple(reader.arrivals_s),
        error=error,
        is_timeout=is_timeout,
    )


class _Reader:
    """Reads the events of one stream. SGLang repeats the whole answer in each, or with a server's flag only news."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.arrivals_s: list[tuple[float, int]] = []
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self._count = 0
        self._is_done = False
        self._error: str | None = None

    def feed(self, line: bytes, at_s: float) -> None:
        if not line.startswith(_DATA):
            return
        data = line[len(_DATA) :].strip()
        if data == _DONE:
            self._is_done = True
            return
        event: dict[str, Any] = _json.loads(data)
        if "error" in event:
            self._error = str(event["error"].get("message", event["error"]))
            return
        meta, ids = event["meta_info"], event.get("output_ids") or []
        count = int(meta["completion_tokens"])
        self.token_ids = list(ids) if len(ids) == count else [*self.token_ids, *ids]
        self.prompt_tokens = int(meta["prompt_tokens"])
        self.cached_tokens = int(meta.get("cached_tokens") or 0)
        if count > self._count:
            self.arrivals_s.append((at_s, count - self._count))
            self._count = count

    def complaint(self, prompt_tokens: int, answer_tokens: int) -> str | None:
        """What is wrong with the answer: its lengths are checked before its times count."""
        if self._error is not None:
            return self._error
        if not self._is_done:
            return "the stream ended early"
        if len(self.token_ids) != answer_tokens:
            return f"the answer has {len(self.token_ids)} tokens, wanted {answer_tokens}"
        if self.prompt_tokens != prompt_tokens:
            return f"the server read {self.prompt_tokens} prompt tokens, {prompt_tokens} were sent"
        return None
