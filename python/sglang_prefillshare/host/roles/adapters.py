"""Adapters in a scheduler: what cannot be served is found out when it comes, not at a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_prefillshare.errors import ConfigError


def try_adapters(manager: Any) -> None:
    """Put every adapter where a batch would have it.

    SGLang first does that at a request, and one that does not fit would end the server for all of them.
    """
    for lora_id, reference in manager.lora_refs.items():
        if (reason := _why_refused(manager, lora_id)) is not None:
            raise ConfigError(
                f"the module {reference.lora_name} ({reference.lora_path}) cannot be served as an adapter: {reason}"
            )


def load_lora_adapter(original: Callable[..., Any], self: Any, lora_ref: Any) -> Any:
    """Hook on loading while the server serves: an adapter that fits no batch is put back, and the others served on."""
    result = original(self, lora_ref)
    if result.success and (reason := _why_refused(self, lora_ref.lora_id)) is not None:
        self.unload_lora_adapter(lora_ref)
        return self.create_lora_update_result(False, f"{lora_ref.lora_path} cannot be served as an adapter: {reason}")
    return result


def _why_refused(manager: Any, lora_id: str) -> str | None:
    try:
        manager.fetch_new_loras({lora_id})
    except Exception as error:  # of whatever is wrong with its weights
        return str(error)
    return None
