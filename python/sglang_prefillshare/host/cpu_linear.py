"""float32 matrix products on a CPU by oneDNN instead of MKL.

`torch.nn.functional.linear` takes MKL for float32, which keeps to AVX2 on other makers' processors than its own. On an
AMD EPYC oneDNN, which torch contains and takes for bfloat16 anyway, is 1.3 to 2 times as fast at every batch size
(`docs/performance.md`). The arithmetic is float32 as before; sums run in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def apply(
    original: Callable[..., torch.Tensor], self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Hook on `UnquantizedLinearMethod.apply`; x float [tokens, in] to [tokens, out]."""
    if _fits(x, layer.weight):
        return _linear(x, layer.weight, bias)
    return original(self, layer, x, bias)


def compute_lm_head(
    original: Callable[..., torch.Tensor],
    self: Any,
    hidden_states: torch.Tensor,
    lm_head: Any,
    embedding_bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hook on `LogitsProcessor._compute_lm_head`; hidden states float [tokens, hidden] to logits [tokens, vocabulary].

    Heads with an adapter or a quantisation of their own go to SGLang's code, as does a buffer to fill.
    """
    weight = getattr(lm_head, "weight", None)
    is_plain = not hasattr(lm_head, "set_lora") and out is None and embedding_bias is None
    if is_plain and isinstance(weight, torch.Tensor) and _fits(hidden_states, weight):
        return _linear(hidden_states, weight, None)
    return original(self, hidden_states, lm_head, embedding_bias, out=out)


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.dim() == 2
        and x.shape[0] > 0
        and _HAS_ONEDNN
    )


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
