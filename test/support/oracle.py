"""What a PrefillShare pair must answer, computed with plain Transformers: no paging, batching, padding or transfer.

The base computes KV for x1..x(n-1); the decode module takes xn from there and chooses every token greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from test.support.device import DTYPE
from test.support.models import sample_prompt

Adjust = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""What a request's sampling parameters make of the logits [vocabulary] that follow y1..: (logits, y1..) to logits."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Chosen tokens y1.. and, for each, by how much its logit led the second best."""

    token_ids: list[int]
    gaps: list[float]

    @property
    def smallest_gap(self) -> float:
        return min(self.gaps)


class Oracle:
    """A base and a decode module, loaded once, in float32; on a GPU in bfloat16 too, which is what is served there."""

    def __init__(
        self,
        base_path: str | Path,
        module_path: str | Path,
        *,
        adapter: str | Path | None = None,
        dtype: torch.dtype = DTYPE,
    ) -> None:
        """With an `adapter`, the module is that LoRA adapter on `module_path`."""
        self.base = load_model(base_path)
        self.module = load_model(module_path)
        if adapter is not None:
            from peft import PeftModel

            assert dtype is torch.float32, "adapters are compared in float32 only"
            self.module = PeftModel.from_pretrained(self.module, str(adapter)).merge_and_unload()
        self.is_exact = dtype is torch.float32
        self.served = (self.base, self.module)
        if not self.is_exact:
            self.served = (load_model(base_path, dtype), load_model(module_path, dtype))

    def check(
        self,
        input_ids: Sequence[int],
        found: Sequence[int],
        max_new_tokens: int,
        *,
        stop_token_ids: Collection[int] = (),
        adjust: Adjust | None = None,
    ) -> None:
        """Fail unless `found` is the greedy answer of `max_new_tokens` tokens, or as far as its first stop token.

        In float32 that is one answer, equal token for token. In bfloat16 answers part at near ties, and each is right
        from there on. So every token that was served is fed back (teacher forcing): its logit in float32 may be lower
        than the best by at most twice the largest difference that bfloat16 made to any logit on this way, measured with
        Transformers, since both logits may be off by that. Three quarters must be the best, and the base alone, which
        answers where weights or KV were mixed up, must not explain half.
        """
        if self.is_exact:
            wanted = self.generate(input_ids, max_new_tokens, stop_token_ids=stop_token_ids, adjust=adjust).token_ids
            assert list(found) == wanted, f"prompt of {len(input_ids)} tokens"
            return
        stops = [position for position, token in enumerate(found) if token in stop_token_ids]
        length = stops[0] + 1 if stops else max_new_tokens
        assert len(found) == length, f"{len(found)} tokens, wanted {length}"
        logits = forced(self.base, self.module, input_ids, found, adjust)
        difference = (logits - forced(*self.served, input_ids, found, adjust)).abs()
        rounding = float(difference.nan_to_num(0.0).max())  # of what is forbidden to both, the difference is NaN
        chosen = torch.tensor(list(found))
        gaps = logits.max(-1).values - logits.gather(-1, chosen[:, None])[:, 0]
        told = f"prompt of {len(input_ids)} tokens, bfloat16 moves logits by up to {rounding:.3f}: {gaps.tolist()}"
        assert float(gaps.max()) <= 2 * rounding, f"a token that cannot be the best, {told}"
        assert int((gaps == 0).sum()) >= 0.75 * len(found), f"too many second choices, {told}"
        assert adjust is not None or not self.base_explains(input_ids, found, 2), f"the base alone answers so, {told}"

    def base_explains(self, input_ids: Sequence[int], answer: Sequence[int], parts: int) -> bool:
        """Whether the base alone chooses more than one in `parts` of the answer's tokens; never of an equal module."""
        if _equal(self.base, self.module):
            return False
        of_base = forced(self.base, self.base, input_ids, answer).argmax(-1)
        return int((of_base == torch.tensor(list(answer))).sum()) > len(answer) // parts

    def generate(
        self,
        input_ids: Sequence[int],
        max_new_tokens: int,
        *,
        stop_token_ids: Collection[int] = (),
        adjust: Adjust | None = None,
    ) -> Generation:
        return generate(self.base, self.module, input_ids, max_new_tokens, stop_token_ids=stop_token_ids, adjust=adjust)


def clear_prompt(
    oracle: Oracle, tokens: int, max_new_tokens: int, *, seed: int = 0, min_gap: float = 3e-3
) -> list[int]:
    """A random prompt of `tokens` tokens whose greedy answer has no near tie, so that it may be compared exactly.

    `min_gap` is ten times the largest float32 noise seen on these models' logits (3e-4). Where answers are not compared
    exactly, ties may be near, and the base alone must choose less than a quarter of the answer's tokens: now and then a
    module and its base repeat the same token for ever.
    """
    for attempt in range(50):
        prompt = sample_prompt(tokens, seed=seed * 1000 + attempt)
        answer = oracle.generate(prompt, max_new_tokens)
        if answer.smallest_gap >= min_gap if oracle.is_exact else not oracle.base_explains(prompt, answer.token_ids, 4):
            return prompt
    raise AssertionError(f"50 prompts of {tokens} tokens, and no answer of {max_new_tokens} tokens can be told apart")


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """From what is stored: weights that are bfloat16 are the same numbers in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@torch.no_grad()
def forced(
    base: PreTrainedModel,
    module: PreTrainedModel,
    input_ids: Sequence[int],
    answer: Sequence[int],
    adjust: Adjust | None = None,
) -> torch.Tensor:
    """float32 [tokens of the answer, vocabulary]: the module's logits for each of its tokens, given those before it."""
    cache = base_cache(base, input_ids[:-1])
    fed = torch.tensor([[input_ids[-1], *answer[:-1]]])
    logits: torch.Tensor = module(fed, past_key_values=cache, use_cache=True).logits[0].float()
    if adjust is None:
        return logits
    return torch.stack([adjust(row, list(answer[:position])) for position, row in enumerate(logits)])


def _equal(base: PreTrainedModel, module: PreTrainedModel) -> bool:
    pairs = zip(base.parameters(), module.parameters(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


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
    adjust: Adjust | None = None,
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
        best = (logits if adjust is None else adjust(logits, token_ids)).topk(2)
        token = int(best.indices[0])
        token_ids.append(token)
        gaps.append(float(best.values[0] - best.values[1]))
        if token in stop_token_ids:
            break
    return Generation(token_ids, gaps)
