"""What does a module lose when the base prefills its prompts, and what does cache-conditioned fine-tuning give back?

The paper's Figure 2 at home. For every seed a small base is pretrained from scratch. From it, three modules learn task
`code` with the same data in the same order, steps and learning rate: full fine-tuning, prefillshare (eq. 7) and
prefillshare with random shares mixed in. Each then answers the same fresh prompts with 0 to 100 % of the prompt's KV
from the base. Task `next_key` is learned in the same three ways; on it cache-conditioning falls short.

Writes out/figure2/curve.json and, if matplotlib is installed, curve.png beside it.

    python benchmark/training/figure2.py --seeds 1
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Final

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmark.training.characters import CHARACTERS, SKILLS, TASKS, Sample, encode, pretraining_row  # noqa: E402
from sglang_prefillshare.environment import describe_environment  # noqa: E402
from sglang_prefillshare.training.data import base_token_count, draw_share  # noqa: E402
from sglang_prefillshare.training.evaluate import Evaluator, Question, TaskSet  # noqa: E402
from sglang_prefillshare.training.loss import Example, cache_conditioned_loss, collate  # noqa: E402
from sglang_prefillshare.training.recipe import RandomShare  # noqa: E402
from sglang_prefillshare.training.sharing_curve import SHARES  # noqa: E402
from sglang_prefillshare.training.trainer import frozen_copy  # noqa: E402

METHODS: Final[dict[str, float | RandomShare]] = {
    "full_ft": 0.0,
    "prefillshare": 1.0,
    "prefillshare_mixed": RandomShare(random=0.5),
}
"""Each method is the share of the prompt's KV that comes from the base while training."""

TASK, LIMITS_TASK = TASKS
Curves = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Everything that decides how long a run takes and what comes out."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    rope_theta: float = 100.0  # rows are short: more of a head's dimensions can tell neighbours apart
    initializer_range: float = 0.06
    pretrain_steps: int = 1300
    pretrain_rows: int = 32
    pretrain_rate: float = 5e-3
    pretrain_embedding_rate: float = 3e-3
    finetune_steps: int = 600
    finetune_rows: int = 32
    finetune_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    eval_prompts: int = 512
    eval_rows: int = 128


def new_model(sizes: Sizes, *, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights over the vocabulary of characters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=sizes.hidden,
        intermediate_size=3 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        initializer_range=sizes.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def pretrain(sizes: Sizes, *, seed: int, on_step: Callable[[float], object]) -> LlamaForCausalLM:
    """The base of a seed. `on_step` is told the loss."""
    base = new_model(sizes, seed=seed)
    generator = random.Random(f"pretrain/{seed}")

    def loss(_: int) -> torch.Tensor:
        rows = [pretraining_row(generator) for _ in range(sizes.pretrain_rows)]
        ids = torch.tensor([encode(row.text) for row in rows])
        weights = torch.tensor([row.weights for row in rows])[:, 1:]
        logits = base(input_ids=ids[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum()

    # Muon gets to recall in half of AdamW's steps. Modules are fine-tuned with AdamW, as in the paper.
    matrices = [weight for weight in base.model.layers.parameters() if weight.ndim == 2]
    rest = [base.model.embed_tokens.weight, *(weight for weight in base.parameters() if weight.ndim == 1)]
    decay = sizes.weight_decay
    optimizers = [
        torch.optim.Muon(matrices, lr=sizes.pretrain_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        adamw(rest, sizes.pretrain_embedding_rate, sizes),
    ]
    optimise(base, loss, optimizers, steps=sizes.pretrain_steps, warmup_steps=sizes.warmup_steps, on_step=on_step)
    return base


def skill_accuracy(base: LlamaForCausalLM, *, seed: int, row_count: int = 500) -> dict[str, float]:
    """How many of the symbols that can be known the base predicts, by skill, on fresh rows."""
    generator = random.Random(f"skills/{seed}")
    right: dict[str, list[float]] = {skill: [] for skill in SKILLS}
    for row in (pretraining_row(generator) for _ in range(row_count)):
        ids = torch.tensor([encode(row.text)])
        is_known = torch.tensor(row.weights)[1:] == 1
        with torch.no_grad():
            logits = base(input_ids=ids[:, :-1], use_cache=False).logits[0]
        is_right = logits.argmax(dim=-1) == ids[0, 1:]
        right[row.skill].append(float(is_right[is_known].float().mean()))
    return {skill: mean(values) for skill, values in right.items() if values}


def finetune(
    base: LlamaForCausalLM,
    task: str,
    share: float | RandomShare,
    sizes: Sizes,
    *,
    seed: int,
    on_step: Callable[[float], object],
) -> LlamaForCausalLM:
    """A module of `base` for a task. The examples depend on seed and task alone, the same for every method."""
    module = LlamaForCausalLM(base.config)
    module.load_state_dict(base.state_dict())
    samples = draw(task, f"train/{task}/{seed}")
    frozen = base.requires_grad_(False).eval()

    def loss(step: int) -> torch.Tensor:
        examples = []
        for row in range(sizes.finetune_rows):
            prompt, answer = tokens(next(samples))
            drawn = draw_share(share, seed=seed, epoch=0, index=step * sizes.finetune_rows + row)
            examples.append(Example(prompt, answer, base_token_count(len(prompt), drawn)))
        return cache_conditioned_loss(module, frozen, collate(examples))

    optimizers = [adamw(module.parameters(), sizes.finetune_rate, sizes)]
    optimise(module, loss, optimizers, steps=sizes.finetune_steps, warmup_steps=sizes.warmup_steps, on_step=on_step)
    return module


def curve(base: LlamaForCausalLM, module: LlamaForCausalLM, task: str, sizes: Sizes, *, seed: int) -> list[float]:
    """Exact match on fresh prompts at every share. The prompts depend on seed and task alone."""
    samples = draw(task, f"test/{task}/{seed}")
    questions = []
    for index in range(sizes.eval_prompts):
        prompt, answer = tokens(next(samples))
        questions.append(Question(str(index), prompt, (answer,)))
    evaluator = Evaluator(module, frozen_copy(base), batch_size=sizes.eval_rows)
    tasks = TaskSet(questions, "exact_match")
    return [mean(evaluator.answers_right(tasks, share=share)) for share in SHARES]


def adamw(weights: Iterable[torch.nn.Parameter], rate: float, sizes: Sizes) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=sizes.weight_decay)


def optimise(
    model: LlamaForCausalLM,
    loss: Callable[[int], torch.Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    steps: int,
    warmup_steps: int,
    on_step: Callable[[float], object],
) -> None:
    """Steps with clipped gradients, a linear warm-up and a cosine to zero. `on_step` is told the loss."""

    def factor(step: int) -> float:
        return min((step + 1) / warmup_steps, 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    model.train()
    for step in range(steps):
        model.zero_grad()
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        on_step(value.item())
    model.eval()


def draw(task: str, seed: str) -> Iterator[Sample]:
    generator = random.Random(seed)
    while True:
        yield TASKS[task](generator)


def tokens(sample: Sample) -> tuple[Any, Any]:
    prompt, answer = (np.asarray(encode(text), dtype=np.int32) for text in (sample.prompt, sample.answer))
    return prompt, answer


# One seed


def run_seed(sizes: Sizes, *, seed: int, progress: Progress) -> dict[str, Any]:
    """Curves of every method on both tasks, with losses and seconds."""
    started = time.monotonic()

    def told(what: str, steps: int) -> Callable[[float], None]:
        task = progress.add_task(f"seed {seed}: {what}", total=steps, loss="")
        return lambda loss: progress.update(task, advance=1, loss=f"loss {loss:.3f}")

    base = pretrain(sizes, seed=seed, on_step=told("pretraining the base", sizes.pretrain_steps))
    seconds = {"pretrain": time.monotonic() - started}
    skills = skill_accuracy(base, seed=seed)
    told_skills = ", ".join(f"{skill} {value:.3f}" for skill, value in skills.items())
    progress.console.print(f"seed {seed}  base      {told_skills}", highlight=False)
    result: dict[str, Any] = {"seed": seed, "base": skills}
    for task in (TASK, LIMITS_TASK):
        result[task] = {}
        for method, share in METHODS.items():
            began = time.monotonic()
            on_step = told(f"{task}, {method}", sizes.finetune_steps)
            module = finetune(base, task, share, sizes, seed=seed, on_step=on_step)
            seconds[f"{task}/{method}"] = time.monotonic() - began
            result[task][method] = curve(base, module, task, sizes, seed=seed)
            told_curve = "  ".join(f"{value:.3f}" for value in result[task][method])
            progress.console.print(f"seed {seed}  {task:8}  {method:18}  {told_curve}", highlight=False)
    seconds["total"] = time.monotonic() - started
    result["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    return result


# All seeds


def summarise(per_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, by task; with several seeds also the spread."""
    return {
        "shares": list(SHARES),
        **_task_summary([result[TASK] for result in per_seed]),
        "limits": {"task": LIMITS_TASK, **_task_summary([result[LIMITS_TASK] for result in per_seed])},
    }


def _task_summary(curves: Sequence[Curves]) -> dict[str, Any]:
    columns = {method: list(zip(*(each[method] for each in curves), strict=True)) for method in METHODS}
    summary: dict[str, Any] = {method: [mean(values) for values in rows] for method, rows in columns.items()}
    if len(curves) > 1:
        summary["spread"] = {
            method: {
                "min": [min(values) for values in rows],
                "max": [max(values) for values in rows],
                "stdev": [stdev(values) for values in rows],
            }
            for method, rows in columns.items()
        }
    return summary


def table(summary: Mapping[str, Any], title: str) -> Table:
    drawn = Table(title=title)
    drawn.add_column("base KV")
    for share in SHARES:
        drawn.add_column(f"{share:.0%}", justify="right")
    for method in METHODS:
        spread = summary.get("spread", {}).get(method)
        cells = [f"{value:.1%}" for value in summary[method]]
        if spread is not None:
            cells = [f"{cell} ±{100 * each:.1f}" for cell, each in zip(cells, spread["stdev"], strict=True)]
        drawn.add_row(method, *cells)
    return drawn


@click.command(help=__doc__)
@click.option("--seeds", default=1, show_default=True, envvar="SEEDS", type=click.IntRange(1), help="Or SEEDS=n.")
@click.option("--threads", type=click.IntRange(1), help="[default: 2, or 1 if the machine is busy]")
@click.option("--pretrain-steps", default=Sizes().pretrain_steps, show_default=True)
@click.option("--finetune-steps", default=Sizes().finetune_steps, show_default=True)
@click.option("--out", default=ROOT / "out" / "figure2", type=click.Path(path_type=Path), show_default=False)
def main(seeds: int, threads: int | None, pretrain_steps: int, finetune_steps: int, out: Path) -> None:
    sizes = Sizes(pretrain_steps=pretrain_steps, finetune_steps=finetune_steps)
    threads = threads or free_threads()
    torch.set_num_threads(threads)
    console = Console()
    started = time.monotonic()
    environment = describe_environment(("sglang-prefillshare", "torch", "transformers", "numpy"))
    told = ", ".join(f"{name} {found}" for name, found in environment["versions"].items())
    opening = f"{environment['command']}\n{environment['commit']}, {told}, {seeds} seeds, {threads} threads"
    console.print(opening, highlight=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    per_seed = []
    with Progress(*columns, console=console) as progress:
        for seed in range(seeds):
            per_seed.append(run_seed(sizes, seed=seed, progress=progress))
    summary = {
        "question": "How much does accuracy fall with the share of the prompt's KV that the base computed?",
        **summarise(per_seed),
        "task": TASK,
        "per_seed": per_seed,
        "seconds": round(time.monotonic() - started, 1),
        **environment,
        "config": asdict(sizes) | {"seeds": seeds, "threads": threads},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "curve.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print(table(summary, f"task {TASK}"), table(summary["limits"], f"task {LIMITS_TASK}"))
    console.print(f"written to {out / 'curve.json'}, {summary['seconds']:.0f} s", highlight=False, soft_wrap=True)
    try:
        from benchmark.training.plot import draw_curves

        draw_curves(summary, out / "curve.png")
        console.print(f"drawn in {out / 'curve.png'}", highlight=False, soft_wrap=True)
    except ImportError as error:
        console.print(f"not drawn: {error}", highlight=False)


def free_threads() -> int:
    """Two where two cores are idle: models this small gain nothing from more, and threads that wait stall."""
    cores = os.cpu_count() or 1
    return 2 if cores - os.getloadavg()[0] >= 2 else 1


if __name__ == "__main__":
    main()
