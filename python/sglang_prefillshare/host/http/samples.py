"""Several answers to one prompt (`n`): the first goes ahead, and the others follow over the KV that it brought.

SGLang computes a prompt once before it samples n times. With prefill and decode apart that is a request without a room,
which waits for ever. Here each answer is a request with a room of its own. Prefill computes x1..x(n-1) for the first
and finds them in its tree for the others. Decode sends the others off when the first has begun to answer, and so finds
the KV in its tree, too: it is handed over once.

Answers come in SGLang's order, those of one prompt in a row, so that its endpoints number and count them as its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from http import HTTPStatus
from typing import Any, Final

from sglang_prefillshare.host.http.requests import ONE_FOR_EACH_PROMPT, is_for_each_prompt, prompts_of
from sglang_prefillshare.request_fields import NO_LIMITS, check_batch, samples

Generate = Callable[[Any], AsyncGenerator[Any, None]]
"""SGLang's `generate_request`, of a batch: yields one list of whole answers, or each piece of a stream by itself."""

HEAD_START_S: Final = 20.0
"""How long the others wait on decode for a first answer to begin. Behind a long queue they follow without it, before
prefill takes their other half for lost."""

_OF_EACH_ANSWER: Final = ("rid", "bootstrap_host", "bootstrap_port", "bootstrap_room")
_END: Final = object()


def sample_count(obj: Any) -> int:
    """`n` of a request as it came. Raises `ValueError`, which SGLang turns into a 400."""
    params = getattr(obj, "sampling_params", None)
    named = [item.get("n") for item in (params if isinstance(params, list) else [params]) if isinstance(item, dict)]
    for count in named:
        if count is not None:
            samples("n", count, NO_LIMITS)
    counts = {1 if count is None else count for count in named}
    if len(counts) > 1:
        raise ValueError("n differs between the prompts of a batch. Give all of them the same.")
    return int(next(iter(counts), 1))


def split(obj: Any, count: int) -> tuple[Any, Any]:
    """The first answer of each prompt as one batch, and the `count` - 1 others as another; both ask for one each.

    Raises `ValueError` for a list that has not one value for each answer.
    """
    prompts, is_batch = prompts_of(obj)
    size = len(prompts)
    check_batch("the request", size, count)
    if obj.bootstrap_room is not None and not isinstance(obj.bootstrap_room, list):
        raise ValueError(f"bootstrap_room is one, and each of {size * count} answers needs its own. List them.")
    firsts, others = copy.copy(obj), copy.copy(obj)
    prompts_name: Final = "text" if obj.text is not None else "input_ids"
    setattr(firsts, prompts_name, prompts)
    setattr(others, prompts_name, [prompt for prompt in prompts for _ in range(count - 1)])
    for field in ONE_FOR_EACH_PROMPT:
        value: Any = getattr(obj, field, None)
        if field == "rid" and not isinstance(value, list):
            name = uuid.uuid4().hex if value is None else value
            value = [f"{name}_{place}" for place in range(size * count)]
        if field in _OF_EACH_ANSWER and isinstance(value, list):
            if len(value) != size * count:
                raise ValueError(f"{field} lists {len(value)} values, wanted one for each of {size * count} answers.")
            setattr(firsts, field, value[::count])
            setattr(others, field, [item for place, item in enumerate(value) if place % count])
        elif is_batch and is_for_each_prompt(value, field):
            setattr(others, field, [item for item in value for _ in range(count - 1)])
    for half in (firsts, others):
        params = half.sampling_params
        half.sampling_params = [_single(item) for item in params] if isinstance(params, list) else _single(params)
    return firsts, others


def _single(params: dict[str, Any]) -> dict[str, Any]:
    return {**params, "n": 1}


async def answer_prompt_first(
    generate: Generate,
    obj: Any,
    count: int,
    *,
    is_prefill: bool,
    can_stream: bool,
    is_gone: Callable[[], Awaitable[bool]],
) -> AsyncGenerator[Any, None]:
    """Answer a request for `count` answers to each prompt as SGLang does: yield one list of all, or a stream's pieces.

    On prefill the first answers are complete before the others are sent off; elsewhere they have begun, which only a
    stream shows (`can_stream` says that one may be made of the first answers). `is_gone` tells whether the client has
    left by then.
    """
    is_stream = bool(obj.stream)
    firsts, others = split(obj, count)
    size = len(prompts_of(firsts)[0])
    # SGLang looks at both when a stream has ended, to abort what is left.
    obj.is_single, obj.rid = False, [*firsts.rid, *others.rid]
    firsts.stream = is_stream or (can_stream and not is_prefill)
    pieces: asyncio.Queue[Any] = asyncio.Queue()
    may_follow = asyncio.Event()
    if not firsts.stream and not is_prefill:
        may_follow.set()

    async def follow() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if is_prefill else HEAD_START_S):
                await may_follow.wait()
        if await is_gone():
            raise ValueError("the client has left.")
        async with contextlib.aclosing(generate(others)) as stream:
            async for piece in stream:
                for place, answer in _numbered(piece):
                    prompt, sample = divmod(place, count - 1)
                    pieces.put_nowait((prompt * count + 1 + sample, answer))

    async def lead(following: asyncio.Task[None]) -> None:
        begun: set[int] = set()
        async with contextlib.aclosing(generate(firsts)) as stream:
            async for piece in stream:
                for place, answer in _numbered(piece):
                    if not is_stream:
                        _raise_if_aborted(answer)
                    elif _abort_of(answer) is not None:
                        following.cancel()
                    begun.add(place)
                    pieces.put_nowait((place * count, answer))
                if firsts.stream and len(begun) == size:
                    may_follow.set()
        may_follow.set()

    async def run() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                await lead(group.create_task(follow()))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    running = asyncio.create_task(run())
    running.add_done_callback(lambda _: pieces.put_nowait(_END))
    last: dict[int, Any] = {}
    try:
        while (item := await pieces.get()) is not _END:
            place, answer = item
            if is_stream:
                yield {**answer, "index": place}
            else:
                last[place] = {key: value for key, value in answer.items() if key != "index"}
        await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    if not is_stream:
        yield [last[place] for place in range(size * count)]


def _numbered(piece: Any) -> Iterator[tuple[int, Any]]:
    """A batch's answers, or the piece of one of them, each with its place."""
    if isinstance(piece, list):
        yield from enumerate(piece)
    else:
        yield piece["index"], piece


def _abort_of(answer: Any) -> tuple[int, str] | None:
    """Status and reason of an answer that SGLang ended."""
    reason = answer["meta_info"].get("finish_reason")
    if not isinstance(reason, dict) or reason.get("type") != "abort":
        return None
    return int(reason.get("status_code") or HTTPStatus.SERVICE_UNAVAILABLE), str(reason.get("message"))


def _raise_if_aborted(answer: Any) -> None:
    """As SGLang does for answers that are not streamed."""
    abort = _abort_of(answer)
    if abort is None:
        return
    status, message = abort
    if status == HTTPStatus.BAD_REQUEST:
        raise ValueError(message)
    from fastapi import HTTPException

    raise HTTPException(status, message)
