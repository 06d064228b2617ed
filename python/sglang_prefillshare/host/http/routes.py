"""What a worker with a role adds to SGLang's HTTP server: its description, a leg's accounting, some closed doors."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

import sglang_prefillshare
from sglang_prefillshare.bounded_http import BoundedHttpProtocol
from sglang_prefillshare.host.http.modules import ModuleMiddleware
from sglang_prefillshare.host.http.requests import check_lists, limits_of
from sglang_prefillshare.host.http.samples import answer_prompt_first, sample_count
from sglang_prefillshare.host.http.tree import SilentSchedulerError, TreeDescriptions, parse_limit
from sglang_prefillshare.host.roles.prefill import BLOCK_KEY, REPORT_KEY
from sglang_prefillshare.host.roles.role import SchedulerRole, role_of
from sglang_prefillshare.host.room import find_room, offer_room
from sglang_prefillshare.protocol import (
    ADAPTER_HEADER,
    BLOCKS_HEADER,
    BOUNDARY_RULE,
    CACHED_TOKENS_HEADER,
    CROSS_MODEL_HEADER,
    MAX_BLOCKS_TOLD,
    MODULE_HEADER,
    PROMPT_TOKENS_HEADER,
    RID_HEADER,
    TREE_PATH,
    WORKER_INFO_PATH,
    Role,
    WorkerInfo,
)
from sglang_prefillshare.request_fields import MAX_DEPTH
from sglang_prefillshare.settings import current_settings

INIT_INFO_KEY: Final = "prefill_share"

_REQUEST_MODELS: Final = "sglang.srt.entrypoints.openai.protocol"
"""Where SGLang reads a request's fields, before anything was answered."""

_NEW_WEIGHTS: Final = "new weights would serve under the old identity. Restart the worker."

_CLOSED_PREFIXES: Final = {
    "/update_weights": _NEW_WEIGHTS,
    "/init_weights_update_group": _NEW_WEIGHTS,
    "/load_lora_adapter_from_tensors": "a module comes in a folder, with its manifest.",
    "/open_session": "send the whole context; its prefix is cached.",
    "/pause_generation": "retracted requests would be prefilled again by the base, generated tokens included.",
    "/begin_weight_update": _NEW_WEIGHTS,
    "/end_weight_update": _NEW_WEIGHTS,
    "/weights_checker": _NEW_WEIGHTS,
    "/release_memory_occupation": "the KV pool is shared with other processes. Restart the worker.",
    "/resume_memory_occupation": "the KV pool is shared with other processes. Restart the worker.",
    "/pd_role_switch": "a worker cannot change sides.",
}

_CLOSED_WITHOUT_ADAPTERS: Final = {
    path: "it was started without adapters (--lora-paths)." for path in ("/load_lora_adapter", "/unload_lora_adapter")
}
"""Paths that only a worker whose modules are adapters has open."""

RESPONSES_PATH: Final = "/v1/responses"
_HEALTH_PATHS: Final = ("/health", "/health_generate", "/ready")


@dataclass(slots=True)
class _Leg:
    """One HTTP request of the worker: what its headers call it, and what is counted for the head of its answer."""

    rid: str | None
    module: str | None
    adapter: str | None
    counts: dict[str, int] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, headers: Iterable[tuple[bytes, bytes]]) -> _Leg:
        by_name = {name.decode("latin-1"): value.decode("utf-8", "replace") for name, value in headers}
        return cls(by_name.get(RID_HEADER), by_name.get(MODULE_HEADER), by_name.get(ADAPTER_HEADER))

    def name(self, obj: Any) -> None:
        """Give a request its leg's id and module, where its API has no place for them."""
        if self.rid is not None and obj.rid is None:
            obj.rid = self.rid
        if self.module is not None and hasattr(obj, "routing_key") and obj.routing_key is None:
            obj.routing_key = self.module
        if self.adapter is not None and obj.lora_path is None:
            obj.lora_path = self.adapter


_leg: ContextVar[_Leg | None] = ContextVar("prefill_share_leg", default=None)


def get_init_info(result: dict[str, Any], self: Any) -> dict[str, Any]:
    """Hook on the scheduler's ready message: tell the HTTP process what only the scheduler knows."""
    role: SchedulerRole = role_of(self)
    result[INIT_INFO_KEY] = {
        "fingerprint": role.fingerprint,
        "kv_dtype": role.kv_dtype,
        "page_size": self.page_size,
        "max_running_requests": self.max_running_requests,
        "max_total_tokens": self.max_total_num_tokens,
        "handoff_failure": role.handoff_failure,
        "pool_place": dict(role.pool_place),
        "room": offer_room(self),
    }
    return result


def setup_http_server(
    original: Callable[..., Any], server_args: Any, tokenizer_manager: Any, *args: Any, **kwargs: Any
) -> Any:
    """Hook on the start of SGLang's HTTP server: add our route and middleware to its app, and bound what it reads."""
    from sglang.srt.entrypoints import http_server
    from uvicorn.protocols.http import auto

    auto.AutoHTTPProtocol = BoundedHttpProtocol  # what uvicorn takes unless it is told otherwise
    infos = kwargs.get("scheduler_infos") or args[2]
    ranks = [info[INIT_INFO_KEY] for info in infos if INIT_INFO_KEY in info]
    failure = next((rank["handoff_failure"] for rank in ranks if rank["handoff_failure"] is not None), None)
    description = _describe(tokenizer_manager, {**ranks[0], "handoff_failure": failure}).to_json()

    has_adapters = description["modules"] is not None
    words = find_room(next((rank["room"] for rank in ranks if rank["room"] is not None), None))

    async def worker_info() -> dict[str, Any]:
        room = words.read() if words is not None else None
        changing = {"room": None if room is None else dataclasses.asdict(room)}
        return description | changing | ({"modules": sorted(tokenizer_manager.lora_ref_cache)} if has_adapters else {})

    http_server.app.add_api_route(WORKER_INFO_PATH, worker_info, methods=["GET"])
    http_server.app.add_api_route(TREE_PATH, _tree_endpoint(tokenizer_manager, description), methods=["GET"])
    http_server.app.add_middleware(
        LegMiddleware,
        handoff_failure=failure,
        is_warming_up=lambda: _is_warming_up(tokenizer_manager),
        has_responses=lambda: hasattr(http_server.app.state, "openai_serving_responses"),
        has_adapters=has_adapters,
    )
    if has_adapters:
        http_server.app.add_middleware(ModuleMiddleware, manager=tokenizer_manager)
    return original(server_args, tokenizer_manager, *args, **kwargs)


def _tree_endpoint(tokenizer_manager: Any, description: dict[str, Any]) -> Callable[[str | None], Awaitable[Any]]:
    from fastapi.responses import JSONResponse

    descriptions = TreeDescriptions(
        tokenizer_manager, {name: description[name] for name in ("role", "model", "base_fingerprint", "page_size")}
    )

    async def tree(limit: str | None = None) -> Any:
        try:
            return JSONResponse(await descriptions.latest(parse_limit(limit)))
        except ValueError as error:
            return JSONResponse(_error(str(error), HTTPStatus.BAD_REQUEST), HTTPStatus.BAD_REQUEST)
        except SilentSchedulerError as error:
            return JSONResponse(_error(str(error), HTTPStatus.SERVICE_UNAVAILABLE), HTTPStatus.SERVICE_UNAVAILABLE)

    return tree


def _is_warming_up(tokenizer_manager: Any) -> bool:
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    return bool(tokenizer_manager.server_status == ServerStatus.Starting)


def _describe(tokenizer_manager: Any, scheduler: dict[str, Any]) -> WorkerInfo:
    settings = current_settings()
    assert settings is not None
    config = tokenizer_manager.config_value
    is_prefill = settings.role is Role.PREFILL
    limits = limits_of(tokenizer_manager)
    return WorkerInfo(
        role=settings.role,
        model=tokenizer_manager.served_model_name,
        base_fingerprint=scheduler["fingerprint"],
        boundary=BOUNDARY_RULE,
        trained=settings.trained,
        transfer_backend=settings.transfer_backend,
        page_size=scheduler["page_size"],
        kv_dtype=scheduler["kv_dtype"],
        max_total_tokens=scheduler["max_total_tokens"],
        max_running_requests=scheduler["max_running_requests"],
        context_length=tokenizer_manager.context_len,
        bootstrap_port=int(config("disaggregation_bootstrap_port")) if is_prefill else None,
        version=sglang_prefillshare.__version__,
        vocab_size=limits.vocab_size,
        max_prompt_bytes=limits.max_prompt_bytes,
        handoff_failure=scheduler["handoff_failure"],
        modules=sorted(tokenizer_manager.lora_ref_cache) if settings.adapters else None,
        events=settings.events,
        **scheduler["pool_place"],
    )


class LegMiddleware:
    """Refuse endpoints that would break a contract, and report a leg's token counts in response headers.

    A worker that can hand no KV over answers 503 with the reason where it is asked whether it is well, and, after
    SGLang's own warm-up, to every request.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        *,
        handoff_failure: str | None = None,
        is_warming_up: Callable[[], bool] = lambda: False,
        has_responses: Callable[[], bool] = lambda: True,
        has_adapters: bool = False,
    ) -> None:
        self._app = app
        self._has_responses = has_responses
        self._has_adapters = has_adapters
        self._handoff_failure = handoff_failure
        self._is_warming_up = is_warming_up

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        for prefix, reason in (_CLOSED_PREFIXES | ({} if self._has_adapters else _CLOSED_WITHOUT_ADAPTERS)).items():
            if scope["path"].startswith(prefix):
                await _refuse(send, f"{scope['path']} is not supported on a worker with a PrefillShare role: {reason}")
                return
        if self._handoff_failure is not None and (
            scope["path"] in _HEALTH_PATHS or (scope["method"] == "POST" and not self._is_warming_up())
        ):
            await _refuse(send, self._handoff_failure, status=HTTPStatus.SERVICE_UNAVAILABLE)
            return
        if scope["path"].startswith(RESPONSES_PATH) and not self._has_responses():
            reason = f"{RESPONSES_PATH} is off on this worker, its log says why: SGLang needs openai-harmony for it."
            await _refuse(send, reason, status=HTTPStatus.NOT_IMPLEMENTED)
            return
        leg = _Leg.of(scope["headers"])
        counts = leg.counts
        _leg.set(leg)

        async def send_with_counts(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start" and counts:
                headers = [(name.encode(), str(value).encode()) for name, value in counts.items()]
                if 0 < len(leg.blocks) <= MAX_BLOCKS_TOLD:
                    headers.append((BLOCKS_HEADER.encode(), ",".join(leg.blocks).encode()))
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_counts)
        except RecursionError:  # of a parser, before anything was answered
            await _refuse(send, f"The request has arrays or objects inside one another over {MAX_DEPTH} deep.")
        except (AttributeError, KeyError, TypeError) as error:
            if not _is_raised_in(error, _REQUEST_MODELS):
                raise
            await _refuse(send, f"SGLang cannot read the request: a field is of another type than it wants ({error}).")


def _is_raised_in(error: BaseException, module: str) -> bool:
    """Whether the frame that raised it runs code of `module`."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__") == module


async def _refuse(send: Any, reason: str, *, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
    body = json.dumps(_error(reason, status)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _error(reason: str, status: HTTPStatus) -> dict[str, Any]:
    """An error in SGLang's form."""
    kind = "BadRequestError" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "ServiceUnavailableError"
    return {"error": {"message": reason, "type": kind, "code": int(status)}}


def generate_request(
    original: Callable[..., AsyncGenerator[Any, None]], *args: Any, **kwargs: Any
) -> AsyncIterator[Any]:
    """Hook on the tokenizer manager: refuse lists that fit no batch, name a leg that its API has no name for, answer
    several times where that is asked for, and see each answer's meta information on its way out."""
    return _observed(original, *args, **kwargs)


async def _observed(
    original: Callable[..., AsyncGenerator[Any, None]], self: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    leg = _leg.get()
    if leg is not None:
        leg.name(obj)
    try:
        count = sample_count(obj)
        if count == 1:
            check_lists(obj)
    except ValueError:
        obj.is_single, obj.rid = False, []  # SGLang looks at both when a stream has ended, and would end its connection
        raise
    if count == 1:
        answers: AsyncGenerator[Any, None] = original(self, obj, request)
    else:
        answers = _several(original, self, obj, request, count)
    async with contextlib.aclosing(answers) as stream:
        async for answer in stream:
            _count(answer, answers_per_prompt=count)
            yield answer


def _several(
    original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, request: Any, count: int
) -> AsyncGenerator[Any, None]:
    settings = current_settings()
    assert settings is not None

    def generate(half: Any) -> AsyncGenerator[Any, None]:
        check_lists(half)
        return original(manager, half, request)

    async def is_gone() -> bool:
        return request is not None and bool(await request.is_disconnected())

    return answer_prompt_first(
        generate,
        obj,
        count,
        is_prefill=settings.role is Role.PREFILL,
        can_stream=not (manager.incremental_streaming_output or obj.return_flat_raw_output_top_logprobs),
        is_gone=is_gone,
    )


def _count(answer: Any, *, answers_per_prompt: int) -> None:
    """Add what an answer, or a list of them, says of its prompt to the leg's counts: once for each prompt."""
    leg = _leg.get()
    if leg is None:
        return
    counts = leg.counts
    for item in answer[::answers_per_prompt] if isinstance(answer, list) else [answer]:
        meta = item.get("meta_info", {}) if isinstance(item, dict) else {}
        if REPORT_KEY not in meta:
            continue
        cross_model = sum(value or 0 for value in meta[REPORT_KEY])
        for name, value in (
            (PROMPT_TOKENS_HEADER, meta["prompt_tokens"]),
            (CACHED_TOKENS_HEADER, meta["cached_tokens"]),
            (CROSS_MODEL_HEADER, cross_model),
        ):
            counts[name] = counts.get(name, 0) + int(value)
        if BLOCK_KEY in meta:
            block = next((value for value in meta[BLOCK_KEY] or () if value is not None), "")
            leg.blocks.append(f"{meta['prompt_tokens']}:{block}")
