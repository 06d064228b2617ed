"""Checks a demo's answers against plain Transformers: no SGLang, no paging, batching or transfer of KV.

    python examples/demo/oracle.py out/demo/transcript.json

For each call the base computes KV for x1..x(n-1), and the decode module takes xn from there. Instead of generating, the
module reads xn and the served answer y1..ym at once: where at every position the token that it likes best is the one
that was served, generating greedily would have given just that answer, token by token. It takes one pass per call, and
where the two differ it also tells by how much.

The demo runs it in a process of its own, which imports nothing of SGLang. Prints one line of JSON per call.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

NOISE: Final[Mapping[str, float]] = {"float32": 1e-3, "bfloat16": 1.0}
"""Between two ways to compute the same logits (which here are 10 to 30 large) in this dtype; below it, which of two
tokens is chosen is chance. Seen on the demo's models in float32: 1e-5 in a log-probability."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the oracle says of one call.

    `first_difference` is the index of the first served token that is not the oracle's, `None` if there is none.
    `largest_gap` is by how much the oracle likes its own token better than the served one, at worst;
    `smallest_lead` by how much the best token led the second one, at the closest position.
    `log_prob_error` compares the served log-probabilities, where the transcript has them.
    """

    is_equal: bool
    first_difference: int | None
    largest_gap: float
    smallest_lead: float
    log_prob_error: float | None


class Oracle:
    """A base and decode modules, whole or adapters of it, in float32.

    Keeps the base's KV from call to call, and of it what is still a prefix.
    """

    def __init__(self, base: Path | str, modules: Mapping[str, Path | str]) -> None:
        self._base = _load(base)
        self._modules = {name: _load_module(path, base) for name, path in modules.items()}
        self._cache: DynamicCache | None = None
        self._cached_ids: list[int] = []

    def check(self, call: Mapping[str, Any]) -> Verdict:
        """Judge one call of a transcript; its keys are those of `program.Call`."""
        import torch

        prompt, answer = list(call["prompt_ids"]), list(call["answer_ids"])
        if not answer:
            raise ValueError(f"a call of {call['model']} has no answer, wanted at least one token")
        module = self._modules[call["model"]]
        with torch.inference_mode():
            cache = self._base_cache(prompt[:-1])
            logits = module(torch.tensor([[prompt[-1], *answer[:-1]]]), past_key_values=cache, use_cache=True).logits[0]
            cache.crop(-len(answer))  # what the module appended is not the base's
            best = logits.topk(2).values
            served = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            gaps = best[:, 0] - served
            different = [index for index, gap in enumerate(gaps.tolist()) if gap > 0]
            error = None
            if call.get("log_probs") is not None:
                own = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
                error = float((own - torch.tensor(call["log_probs"])).abs().max())
        return Verdict(
            is_equal=not different,
            first_difference=different[0] if different else None,
            largest_gap=float(gaps.max()),
            smallest_lead=float((best[:, 0] - best[:, 1]).min()),
            log_prob_error=error,
        )

    def _base_cache(self, ids: Sequence[int]) -> DynamicCache:
        """KV of `ids` as this oracle's base computes it, and nothing else."""
        import torch
        from transformers import DynamicCache

        kept = common_prefix(self._cached_ids, ids)
        if self._cache is None or kept == 0:
            self._cache = DynamicCache(config=self._base.config)
            kept = 0
        elif kept < len(self._cached_ids):
            self._cache.crop(kept - len(self._cached_ids))
        if kept < len(ids):
            self._base(torch.tensor([ids[kept:]]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cached_ids = list(ids)
        return self._cache


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def check_all(transcript: Mapping[str, Any]) -> Iterator[Verdict]:
    models = dict(transcript["models"])
    oracle = Oracle(models.pop("base"), models)
    for call in transcript["calls"]:
        yield oracle.check(call)


def _load(path: Path | str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _load_module(path: Path | str, base: Path | str) -> PreTrainedModel:
    if not (Path(path) / "adapter_config.json").is_file():
        return _load(path)
    from peft import PeftModel

    adapted: PreTrainedModel = PeftModel.from_pretrained(_load(base), path).merge_and_unload()
    return adapted.eval()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("transcript", type=Path)
    path: Path = parser.parse_args(argv).transcript
    os.environ["TQDM_DISABLE"] = "1"
    for verdict in check_all(json.loads(path.read_text(encoding="utf-8"))):
        print(json.dumps(asdict(verdict)), flush=True)


if __name__ == "__main__":
    main()
