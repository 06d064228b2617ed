"""SGLang's LoRA without an accelerator: it asks for pinned memory, of which there is none, and PyTorch then raises."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


def init_lora_manager(self: Any, *_args: Any, **_kwargs: Any) -> None:
    """Hook before the scheduler's LoRA manager: from here on, memory that is asked for as pinned is ordinary memory."""
    import torch

    if getattr(torch.Tensor.pin_memory, "is_ours", False):
        return

    def pin_memory(self: torch.Tensor, *_: Any) -> torch.Tensor:
        return self

    setattr(pin_memory, "is_ours", True)  # noqa: B010
    torch.Tensor.pin_memory = pin_memory
    for name in ("tensor", "zeros", "empty"):
        setattr(torch, name, _unpinned(getattr(torch, name)))


def _unpinned(factory: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make
