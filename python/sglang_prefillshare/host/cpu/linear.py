"""Products with weights on a CPU: by oneDNN, from weights that were packed once.

oneDNN wants weights in blocks and, given a plain matrix, arranges them again in every product; for the few rows of a
decode step or of a short prompt that costs as much as the product. Here each weight is packed at its first use and kept
beside the plain one, while the machine has memory for both. float32 is taken from MKL as well, which keeps to AVX2 on
other makers' processors than its own. The arithmetic stays; sums may run in another order. `docs/performance.md` has
what it gains.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

import psutil
import torch

logger = logging.getLogger(__name__)

MEMORY_TO_LEAVE: Final = 0.1
"""Of the machine's memory: a weight that would leave less available is not packed."""

_PACKED: Final = "_prefillshare_packed"
_ROWS_TO_PACK_FOR: Final = 64
"""oneDNN picks blocks for a number of rows; those for 64 are the fastest, or equal, for 1 to 512 of them."""


def apply(
    original: Callable[..., torch.Tensor], self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Hook on `UnquantizedLinearMethod.apply`; x float32 or bfloat16 [tokens, in] to [tokens, out]."""
    found = _product(x, layer.weight, bias)
    return original(self, layer, x, bias) if found is None else found


def compute_lm_head(
    original: Callable[..., torch.Tensor],
    self: Any,
    hidden_states: torch.Tensor,
    lm_head: Any,
    embedding_bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hook on `LogitsProcessor._compute_lm_head`; hidden states [tokens, hidden] to logits [tokens, vocabulary].

    Heads with an adapter or a quantisation of their own go to SGLang's code, as does a buffer to fill.
    """
    weight = getattr(lm_head, "weight", None)
    is_plain = not hasattr(lm_head, "set_lora") and out is None and embedding_bias is None
    in_float32 = getattr(self, "use_fp32_lm_head", False)
    if is_plain and not in_float32 and isinstance(weight, torch.Tensor):
        found = _product(hidden_states, weight, None)
        if found is not None:
            return found
    return original(self, hidden_states, lm_head, embedding_bias, out=out)


def forget_packed(self: Any, op: str) -> None:
    """Hook before `WeightUpdater._assert_weight_cache_inactive`, which every update of weights in place calls first.

    The next product packs anew.
    """
    for weight in self.get_model().parameters():
        weight.__dict__.pop(_PACKED, None)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """None if it is not ours to do."""
    is_ours = (
        x.dtype is weight.dtype
        and x.dtype in _DTYPES
        and x.device.type == weight.device.type == "cpu"
        and x.dim() == 2
        and x.shape[0] > 0
    )
    if not is_ours:
        return None
    packed = weight.__dict__.get(_PACKED)
    if packed is None:
        packed = weight.__dict__[_PACKED] = _pack(weight)
    if packed is weight and x.dtype is not torch.float32:
        return None  # torch would do the same
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _pack(weight: torch.Tensor) -> torch.Tensor:
    """The weight in oneDNN's blocks, or itself where memory is short."""
    memory = psutil.virtual_memory()
    if memory.available - weight.nbytes < MEMORY_TO_LEAVE * memory.total:
        _warn(memory.available, memory.total)
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_TO_PACK_FOR)


def _warn(available: int, total: int) -> None:
    """Once; a model has hundreds of weights."""
    global _has_warned
    if not _has_warned:
        _has_warned = True
        logger.warning(
            "%.1f of %.1f GiB of memory are available: too little to pack weights, so products with them take longer.",
            available / 2**30,
            total / 2**30,
        )


_has_warned = False


def _dtypes() -> tuple[torch.dtype, ...]:
    operators = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in operators):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


_DTYPES: Final = _dtypes()
