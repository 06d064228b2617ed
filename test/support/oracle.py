"""What a PrefillShare pair must answer, computed with plain Transformers: no paging, batching, padding or transfer.

The base computes KV for x1..x(n-1); the decode module takes xn from there and chooses every token greedily.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from test.support.models import sample_prompt


@dataclass(frozen=True, slots=True)
class Generation:
    """Chosen tokens y1.. and, for each, by how much its logit led the second best."""

    token_ids: list[int]
    gaps: list[float]

    @property
    def smallest_gap(self) -> float:
        return min(self.gaps)


class Oracle:
    """A base and a decode module, loaded once, in float32."""

    def __init__(self, base_path: str | Path, module_path: str | Path) -> None:
        self.base = load_model(base_path)
        self.module = load_model(module_path)

    def generate(
        self, input_ids: Sequence[int], max_new_tokens: int, *, stop_token_ids: Collection[int] = ()
    ) -> Generation:
        return generate(self.base, self.module, input_ids, max_new_tokens, stop_token_ids=stop_token_ids)


def clear_prompt(
    oracle: Oracle, tokens: int, max_new_tokens: int, *, seed: int = 0, min_gap: float = 3e-3
) -> list[int]:
    """A random prompt of `tokens` tokens whose greedy answer has no near tie, so that it may be compared exactly.

    `min_gap` is ten times the largest float32 noise seen on these models' logits (3e-4).
    """
    for attempt in range(50):
        prompt = sample_prompt(tokens, seed=seed * 1000 + attempt)
        if oracle.generate(prompt, max_new_tokens).smallest_gap >= min_gap:
            return prompt
    raise AssertionError(f"50 prompts of {tokens} tokens all lead to a near tie within {max_new_tokens} tokens")


def load_model(path: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def base_cache(base: PreTrainedModel, input_ids: Sequence[int]) -> DynamicCache:
    """KV of `input_ids` under the base. Fresh on every call: whoever reads a cache appends to it in place."""
    cache = DynamicCache(config=base.config)
    if input_ids:
        base(torch.tensor([list(input_ids)]), past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def generate(
    base: PreTrainedModel,
    decode_module: PreTrainedModel,
    input_ids: Sequence[int],
    max_new_tokens: int,
    *,
    stop_token_ids: Collection[int] = (),
) -> Generation:
    """Greedy answer to x1..xn (n >= 1; for n = 1 there is no base KV). A stop token ends it and is included."""
    if not input_ids:
        raise ValueError("input_ids is empty, wanted at least one token")
    cache = base_cache(base, input_ids[:-1])
    token = input_ids[-1]
    token_ids: list[int] = []
    gaps: list[float] = []
    for position in range(len(input_ids) - 1, len(input_ids) - 1 + max_new_tokens):
        logits = decode_module(
            torch.tensor([[token]]),
            past_key_values=cache,
            position_ids=torch.tensor([[position]]),
            use_cache=True,
        ).logits[0, -1]
        best = logits.topk(2)
        token = int(best.indices[0])
        token_ids.append(token)
        gaps.append(float(best.values[0] - best.values[1]))
        if token in stop_token_ids:
            break
    return Generation(token_ids, gaps)
