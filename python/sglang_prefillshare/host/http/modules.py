"""Modules by name, of a unified server or of a decode worker: each is an adapter, and the base answers nobody."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any, Final

from sglang_prefillshare.errors import ConfigError, PrefillShareError
from sglang_prefillshare.identity.adapter import read_adapter
from sglang_prefillshare.identity.manifest import check_training
from sglang_prefillshare.settings import current_settings

PATH_PREFIX: Final = "/m/"
"""For clients that expect a server per model, as SGLang's frontend does: `/m/<module>/generate`."""

MODELS_PATH: Final = "/v1/models"

named_by_path: ContextVar[str | None] = ContextVar("prefill_share_module", default=None)
is_posted: ContextVar[bool] = ContextVar("prefill_share_posted", default=False)
"""Whether a client sent the request: SGLang's own health checks answer a GET."""


def resolve_lora_path(original: Callable[..., Any], self: Any, request_model: str, explicit_lora_path: Any) -> Any:
    """Hook on SGLang's OpenAI endpoints: `model` names a module. Raises a 404 for one that there is not."""
    from fastapi import HTTPException

    manager = self.tokenizer_manager
    named = original(self, request_model, explicit_lora_path)
    named = request_model if named is None else named
    for name in named if isinstance(named, list) else [named]:
        try:
            check_module(manager, name)
        except ConfigError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, str(error)) from None
    return named


async def validate_and_resolve_lora(original: Callable[..., Awaitable[None]], self: Any, obj: Any) -> None:
    """Hook on every request of the HTTP process: it is a module's, or SGLang's own question whether the server works.

    SGLang turns `ValueError` into a 400.
    """
    if obj.lora_path is None:
        obj.lora_path = named_by_path.get()
    if not _is_sglangs_own(self):
        for name in obj.lora_path if isinstance(obj.lora_path, list) else [obj.lora_path]:
            try:
                check_module(self, name)
            except ConfigError as error:
                obj.lora_path = None  # or SGLang would give back what it has not taken
                raise ValueError(str(error)) from None
    await original(self, obj)


async def load_lora_adapter(original: Callable[..., Awaitable[Any]], self: Any, obj: Any, *args: Any) -> Any:
    """Hook on SGLang's loading while it serves: an adapter is looked at as one that is given at start-up is."""
    settings = current_settings()
    assert settings is not None
    try:
        if obj.lora_name == self.served_model_name:
            raise ConfigError(f"{obj.lora_name!r} is the base's name. Give the module another one.")
        folder = str(read_adapter(obj.lora_name, obj.lora_path).folder)
        check_training(folder, settings.base, settings.identity, allow_untrained=False)
    except PrefillShareError as error:
        from sglang.srt.managers.io_struct import LoadLoRAAdapterReqOutput

        return LoadLoRAAdapterReqOutput(success=False, error_message=str(error))
    return await original(self, obj, *args)


async def unload_lora_adapter(original: Callable[..., Awaitable[Any]], self: Any, obj: Any, *args: Any) -> Any:
    """Hook on its counterpart: from now on nobody can ask for the module, and requests under way end as they would.

    SGLang would load it again for the next request.
    """
    from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqOutput

    try:
        check_module(self, obj.lora_name)
    except ConfigError as error:
        return UnloadLoRAAdapterReqOutput(success=False, error_message=str(error))
    reference = self.lora_ref_cache.pop(obj.lora_name)
    result = await original(self, obj, *args)
    if not result.success:
        self.lora_ref_cache.setdefault(obj.lora_name, reference)
    return result


class ModuleMiddleware:
    """A URL for each module, `/m/<module>/…`, and models that are modules at `/v1/models`."""

    def __init__(self, app: Callable[..., Awaitable[None]], *, manager: Any) -> None:
        self._app = app
        self._manager = manager

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_posted.set(scope["method"] == "POST")
        path: str = scope["path"]
        if path.startswith(PATH_PREFIX):
            name, _, rest = path.removeprefix(PATH_PREFIX).partition("/")
            try:
                check_module(self._manager, name)
            except ConfigError as error:
                await _answer(scope, receive, send, _error(str(error)), HTTPStatus.NOT_FOUND)
                return
            named_by_path.set(name)
            path = f"/{rest}"
            scope = {**scope, "path": path, "raw_path": path.encode()}
        if scope["method"] == "GET" and path.rstrip("/") == MODELS_PATH:
            cards = [self._card(name) for name in self._names()]
            await _answer(scope, receive, send, {"object": "list", "data": cards})
        elif scope["method"] == "GET" and path.removeprefix(f"{MODELS_PATH}/") in self._names():
            await _answer(scope, receive, send, self._card(path.removeprefix(f"{MODELS_PATH}/")))
        else:
            await self._app(scope, receive, send)

    def _names(self) -> list[str]:
        named = named_by_path.get()
        return sorted(self._manager.lora_ref_cache) if named is None else [named]

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "prefillshare",
            "root": name,
            "parent": None,
            "max_model_len": int(self._manager.context_len),
        }

    _created: Final = int(time.time())


async def _answer(scope: Any, receive: Any, send: Any, body: dict[str, Any], status: int = HTTPStatus.OK) -> None:
    from starlette.responses import JSONResponse

    await JSONResponse(body, status_code=status)(scope, receive, send)


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "not_found_error", "code": HTTPStatus.NOT_FOUND, "param": "model"}}


def check_module(manager: Any, name: Any) -> None:
    """Raise `ConfigError`, naming the modules, unless `name` is one of them."""
    modules = sorted(manager.lora_ref_cache)
    if name not in modules:
        found = "the request names no module" if name is None else f"there is no module {name!r}"
        raise ConfigError(f"{found}, wanted one of {', '.join(modules)}: as `model`, at /generate as `lora_path`.")


def _is_sglangs_own(manager: Any) -> bool:
    """A health check, or the warm-up before the server is ready."""
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    return not is_posted.get() or bool(manager.server_status == ServerStatus.Starting)
