"""What a batch's penalties are told of: SGLang makes new ones with each batch, and a resumed request has a past."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any


def tell_again(batch: Any, generated: Sequence[Sequence[int]]) -> None:
    """Tell a batch's new penalties of what each of its requests had `generated`, by row.

    SGLang starts at nothing after a retraction, and would forbid the stop tokens for `min_new_tokens` more.
    """
    import torch

    orchestrator = batch.sampling_info.penalizer_orchestrator
    steps = max(map(len, generated), default=0)
    if not steps or not orchestrator.is_required:
        return
    padded = torch.tensor([[*tokens, *[0] * (steps - len(tokens))] for tokens in generated], dtype=torch.int64)
    with ExitStack() as ended:
        for step, column in enumerate(padded.to(batch.device).unbind(1)):
            rows = [row for row, tokens in enumerate(generated) if len(tokens) == step]
            ended.enter_context(rows_kept(batch, dict.fromkeys(orchestrator.penalizers, rows)))
            orchestrator.cumulate_output_tokens(column)


@contextmanager
def rows_kept(batch: Any, rows: Mapping[type, list[int]]) -> Iterator[None]:
    """Give each penalizer class its `rows` back as they were before what SGLang counts in the meantime."""
    import torch

    kept: list[tuple[Any, str, list[int], Any]] = []
    for kind, penalizer in batch.sampling_info.penalizer_orchestrator.penalizers.items():
        for name, value in vars(penalizer).items() if rows[kind] else ():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == len(batch.reqs):
                kept.append((penalizer, name, rows[kind], value[rows[kind]].clone()))
    yield
    for penalizer, name, those, values in kept:
        getattr(penalizer, name)[those] = values
