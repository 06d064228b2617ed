"""Both halves in one server: x1..x(n-1) computed with the base's weights, xn and what follows with an adapter's.

A decode module that is a LoRA adapter differs from its base in what is added to some products, token by token. So no
second pass is needed: in the very pass that computes a prompt's tail, the rows of x1..x(n-1) go without the adapter and
the row of xn with it, and at every layer xn attends to keys and values that only the base has made (contract 1). The
radix tree is keyed by the base alone, and takes x1..x(n-1) of a prompt and nothing after it (contract 2). Scheduling,
chunks, batches, sampling and retraction stay SGLang's.

All functions here are hooks; `seams.py` says where each one goes and why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from sglang_prefillshare.errors import SeamError
from sglang_prefillshare.host.roles.adapters import try_adapters
from sglang_prefillshare.host.roles.penalties import tell_again
from sglang_prefillshare.host.roles.role import attach_role, check_pool, role_of
from sglang_prefillshare.host.roles.tree import attach_tree

BASE: Final = None
"""SGLang's id of no adapter."""


class AdapterId(str):
    """A request's `lora_id` as SGLang compares it, and where in the request the adapter begins.

    SGLang hands the ids of a batch's requests to the model runner, and nothing else of them.
    """

    __slots__ = ("boundary",)
    boundary: int
    """n - 1: tokens before it are the base's."""

    def __new__(cls, lora_id: str, boundary: int) -> AdapterId:
        made = super().__new__(cls, lora_id)
        made.boundary = boundary
        return made


def init_disaggregation(original: Callable[..., None], self: Any) -> None:
    """Give the scheduler its role; there is nobody to hand KV over to."""
    attach_role(self)
    attach_tree(self)
    original(self)
    check_pool(self.token_to_kv_pool_allocator.get_kvcache(), state_types=())
    checkpoint = type(self.tree_cache).checkpoint
    if not hasattr(checkpoint, "__wrapped__"):
        raise SeamError(
            f"this server keeps its radix tree in a {type(self.tree_cache).__name__}, and generated KV would enter it. "
            "Leave SGLang's choice of the tree as it is by default."
        )
    try_adapters(self.tp_worker.model_runner.lora_manager)


def create_generation_req(original: Callable[..., Any], self: Any, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
    """Key the request by the base's identity, whatever its module, and note where its adapter begins.

    SGLang would append the adapter's id to the key.
    """
    lora_id = kwargs.pop("lora_id", None)
    req = original(self, recv_req, *args, **{**kwargs, "lora_id": None, "extra_key": role_of(self).namespace})
    if lora_id is not None:
        req.lora_id = AdapterId(lora_id, _boundary(req))
    return req


def match_kv_cache(
    original: Callable[..., Any],
    req: Any,
    tree_cache: Any,
    token_ids: Any = None,
    *,
    cow_mamba: bool = False,
    max_prefix_len: int | None = None,
) -> Any:
    """Find no more of a request in the tree than x1..x(n-1): another prompt may go on as this answer does."""
    limit = _boundary(req) if max_prefix_len is None else min(_boundary(req), max_prefix_len)
    return original(req, tree_cache, token_ids, cow_mamba=cow_mamba, max_prefix_len=limit)


def checkpoint(original: Callable[..., None], self: Any, req: Any, *, up_to: int, **kwargs: Any) -> None:
    """Put no more of a request into the tree than x1..x(n-1), at whole pages: the page of xn stays the request's."""
    if kept := min(up_to, _boundary(req)):
        original(self, req, up_to=kept, **kwargs)


def prepare_for_extend(original: Callable[..., None], self: Any) -> None:
    """A request that resumes goes on with its penalties, where SGLang would start them at nothing again."""
    original(self)
    tell_again(self, [list(req.output_ids) for req in self.reqs])


def validate_lora_batch(original: Callable[..., bool], self: Any, lora_ids: set[str | None]) -> bool:
    return original(self, lora_ids | {BASE})


def fetch_new_loras(
    original: Callable[..., None],
    self: Any,
    new_loras: set[str | None],
    running_loras: frozenset[str | None] | set[str | None] = frozenset(),
) -> None:
    """The base is in every batch, and needs its place (of zeros) among the adapters there."""
    original(self, new_loras | {BASE}, set(running_loras))


def prepare_lora_batch(original: Callable[..., None], self: Any, forward_batch: Any) -> None:
    """Tell the adapters' kernels of each request's two parts as if they were two requests."""
    original(self, _Parts.of(forward_batch) if forward_batch.forward_mode.is_extend() else forward_batch)


class _Parts:
    """A batch whose sequences are the parts of its requests: each one adapter's, or the base's."""

    def __init__(self, batch: Any, lora_ids: list[str | None], lengths: list[int]) -> None:
        import torch

        self._batch = batch
        self.lora_ids = lora_ids
        self.batch_size = len(lengths)
        self.extend_seq_lens_cpu = lengths
        self.extend_seq_lens = torch.tensor(lengths, dtype=torch.int32).to(batch.extend_seq_lens.device)

    @classmethod
    def of(cls, batch: Any) -> _Parts:
        lora_ids: list[str | None] = []
        lengths: list[int] = []
        for lora_id, start, length in zip(
            batch.lora_ids, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True
        ):
            of_base = 0 if lora_id is BASE else max(0, min(lora_id.boundary - start, length))
            for part, tokens in ((BASE, of_base), (lora_id, length - of_base)):
                if tokens:
                    lora_ids.append(part)
                    lengths.append(tokens)
        return cls(batch, lora_ids, lengths)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)


def _boundary(req: Any) -> int:
    """n - 1: how many of a request's tokens the base computes."""
    return len(req.origin_input_ids) - 1
