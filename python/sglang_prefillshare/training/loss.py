"""Cache-conditioned loss (paper §3.2, eq. 7): the base's KV as a constant, the decode module on what follows it.

For a prompt x1..xn and a response y1..yT, the base computes KV of x1..xc without gradients. The decode module is fed
x(c+1)..xn, y1..y(T-1) and learns y1..yT. With c = n-1 that is the boundary that serving uses
(`protocol.BOUNDARY_RULE`), with c = 0 it is ordinary fine-tuning on the response. Owns tensors only: which c an example
gets, and what is a base, are decided by the callers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from sglang_prefillshare.errors import ConfigError, PrefillShareError

IGNORED: Final = -100
"""The label of a padded position."""

TokenIds: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its response, as token ids. The base computes KV for the first `base_tokens` of the prompt."""

    prompt: TokenIds
    response: TokenIds
    base_tokens: int

    def __post_init__(self) -> None:
        assert 0 <= self.base_tokens < len(self.prompt) and len(self.response) > 0


class Batch(TypedDict):
    """Padded examples, on one device. B examples, C context columns, M columns of the module's own, T labels.

    One row, read over context and own columns:

        [pad.. x1..xc | pad.. x(c+1)..xn  y1..y(T-1) ..pad]

    xn is in the same own column M-T of every row, so that the last T columns are the ones with labels. Positions count
    unpadded tokens only, so padding may be on any side of the context.
    """

    context_ids: torch.Tensor  # [B, C] int64, for the base
    context_mask: torch.Tensor  # [B, C] int64, 0 where padded
    own_ids: torch.Tensor  # [B, M] int64, for the decode module
    own_mask: torch.Tensor  # [B, M] int64, 0 where padded
    labels: torch.Tensor  # [B, T] int64, IGNORED where padded
    shift_labels: torch.Tensor  # the same tensor, under the name that tells the Trainer to count y1 too


def collate(
    examples: Sequence[Example],
    *,
    pad_id: int = 0,
    context_padding: Literal["left", "right"] = "left",
    min_context: int = 0,
) -> Batch:
    """Pad `examples` into one batch, with `min_context` context columns or more."""
    rows = len(examples)
    context = max(min_context, *(example.base_tokens for example in examples))
    rest = max(len(example.prompt) - example.base_tokens for example in examples)
    labelled = max(len(example.response) for example in examples)
    context_ids = np.full((rows, context), pad_id, dtype=np.int64)
    context_mask = np.zeros((rows, context), dtype=np.int64)
    own_ids = np.full((rows, rest + labelled - 1), pad_id, dtype=np.int64)
    own_mask = np.zeros_like(own_ids)
    labels = np.full((rows, labelled), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        count = example.base_tokens
        columns = slice(context - count, context) if context_padding == "left" else slice(0, count)
        context_ids[row, columns] = example.prompt[:count]
        context_mask[row, columns] = 1
        own = np.concatenate([example.prompt[count:], example.response[:-1]])
        start = rest - (len(example.prompt) - count)
        own_ids[row, start : start + len(own)] = own
        own_mask[row, start : start + len(own)] = 1
        labels[row, : len(example.response)] = example.response
    targets = torch.from_numpy(labels)
    return Batch(
        context_ids=torch.from_numpy(context_ids),
        context_mask=torch.from_numpy(context_mask),
        own_ids=torch.from_numpy(own_ids),
        own_mask=torch.from_numpy(own_mask),
        labels=targets,
        shift_labels=targets,
    )


class _ConstantLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a base's KV that is read any number of times and never written.

    Transformers' own layers append to themselves: a second read, or the recomputation of gradient checkpointing, would
    see the first one's tokens. K and V are [B, KV heads, C, head dim], detached.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, on_read: Callable[[], None]) -> None:
        super().__init__()
        self.keys = keys.detach()
        self.values = values.detach()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._on_read = on_read

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's K and V with the given ones behind them, in the given ones' dtype. Keeps nothing."""
        self._on_read()
        keys = torch.cat([self.keys.to(key_states.dtype), key_states], dim=-2)
        values = torch.cat([self.values.to(value_states.dtype), value_states], dim=-2)
        return keys, values


class BasePrefix(Cache):  # type: ignore[misc]
    """C_base of a batch (paper eq. 5): constants that a decode module attends to. Safe to use more than once."""

    def __init__(self, key_values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.reads = 0
        super().__init__(layers=[_ConstantLayer(keys, values, self._count) for keys, values in key_values])

    def _count(self) -> None:
        self.reads += 1


def check_plain_attention(config: Any) -> None:
    """Raise `ConfigError` unless a prompt's state is one K and one V per token and layer, which is what is shared."""
    kinds = sorted(
        {type(layer).__name__ for layer in DynamicCache(config=config).layers if type(layer) is not DynamicLayer}
    )
    if kinds:
        raise ConfigError(
            f"{config.model_type} keeps {', '.join(kinds)} for a prompt, wanted full attention in every layer: "
            "x1..x(n-1) would not be all that the decode module reads. Choose another base."
        )


def base_prefill(base: Any, batch: Batch) -> BasePrefix | None:
    """KV of the context columns under `base` (paper eq. 5), without gradients; `None` where there are no columns.

    `base` is any causal language model of Transformers, wrapped or not. It runs in evaluation mode, and is left in the
    mode it was in; its weights are read only.
    """
    if batch["context_ids"].shape[1] == 0:
        return None
    cache = DynamicCache()
    with torch.no_grad(), _evaluating(base):
        base(
            input_ids=batch["context_ids"],
            attention_mask=batch["context_mask"],
            position_ids=_positions(batch["context_mask"]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return BasePrefix([(layer.keys, layer.values) for layer in cache.layers])


def response_logits(module: Any, batch: Batch, prefix: BasePrefix | None) -> torch.Tensor:
    """The decode module's logits at the labelled positions, [B, T, vocabulary]; none are computed for the prompt.

    Raises `PrefillShareError` when the model does not read the prefix in every layer, which would train it on an answer
    without its prompt.
    """
    if prefix is not None and any(_drops_prefix(layer) for layer in module.modules()):
        raise PrefillShareError(
            "gradient checkpointing would take the base's KV away from the decode module's layers. "
            "Call `keep_prefix_under_checkpointing` on the module first."
        )
    mask = torch.cat([batch["context_mask"], batch["own_mask"]], dim=1)
    own = batch["own_ids"].shape[1]
    reads = 0 if prefix is None else prefix.reads
    logits: torch.Tensor = module(
        input_ids=batch["own_ids"],
        attention_mask=mask if prefix is not None else batch["own_mask"],
        position_ids=_positions(mask)[:, -own:],
        past_key_values=prefix,
        use_cache=False,
        logits_to_keep=batch["labels"].shape[1],
    ).logits
    if prefix is not None and prefix.reads - reads < len(prefix.layers):
        raise PrefillShareError(
            f"the decode module read the base's KV in {prefix.reads - reads} of {len(prefix.layers)} layers. "
            "Its attention does not go through Transformers' cache: choose another architecture."
        )
    return logits


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log P(y_t | y_<t, C_base) for every label, [B, T] float32; 0 where padded."""
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels.shape)


def cache_conditioned_loss(
    module: Any, base: Any | None, batch: Batch, *, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Eq. 7 over a batch, summed over response tokens and divided by `num_items` (default: those of this batch).

    The paper sums; dividing by the tokens of the whole accumulated batch makes the step independent of how it was
    split. `base` may be `None` when no example has context columns.
    """
    prefix = None if base is None else base_prefill(base, batch)
    losses = token_losses(response_logits(module, batch, prefix), batch["labels"])
    return losses.sum() / (batch["labels"].ne(IGNORED).sum() if num_items is None else num_items)


def keep_prefix_under_checkpointing(module: Any) -> None:
    """Let gradient checkpointing keep the base's KV, which Transformers otherwise takes away from a checkpointed layer.

    Transformers keeps it for layers that only read their cache, since the recomputation then reads the same states. A
    `BasePrefix` is only read. Raises `ConfigError` for a model whose layers have no such switch.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers or not hasattr(GradientCheckpointingLayer, "_can_checkpoint_with_cache"):
        import transformers

        raise ConfigError(
            f"gradient checkpointing would drop the base's KV: {type(module).__name__} of transformers "
            f"{transformers.__version__} has no layers that keep it, wanted 5.19. "
            "Set training.gradient_checkpointing: false."
        )
    for layer in layers:
        layer._can_checkpoint_with_cache = True


def _drops_prefix(layer: Any) -> bool:
    return (
        isinstance(layer, GradientCheckpointingLayer)
        and layer.gradient_checkpointing
        and layer.training
        and not getattr(layer, "_can_checkpoint_with_cache", False)
    )


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Each token's place among the unpadded tokens of its row, from 0; padded columns repeat a neighbour's."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No dropout and no checkpointing inside: the base that serves has neither."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
