"""What does a training step cost in time and memory, cache-conditioned against ordinary fine-tuning?

Each way to train (both methods, full weights and LoRA) has a process of its own, which holds its model, its optimizer
and, where it needs one, its frozen copy of the base. The processes take turns, step by step, on the same batches; the
others wait meanwhile. Memory is a process's peak resident set, on a GPU the peak of what torch allocated.

Writes out/bench/training/summary.json.

    python benchmark/training/step_cost.py
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.demo.models import BASE_NAME, prepare_base  # noqa: E402
from sglang_prefillshare.environment import describe_environment  # noqa: E402

METHODS: Final = ("full-ft", "prefillshare")
WEIGHTS: Final = ("full", "lora")
REPLY_TIMEOUT_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Config:
    """What a step computes. Lengths are tokens of every example; `dtype` is that of the weights."""

    base: str
    prompt_tokens: int
    response_tokens: int
    batch_size: int
    steps: int
    warmup_steps: int
    dtype: str
    device: str
    threads: int
    seed: int = 7
    lora_rank: int = 16


@dataclass(frozen=True, slots=True)
class Variant:
    method: str
    weights: str

    @property
    def name(self) -> str:
        return f"{self.method}, {self.weights}"


@click.command(help=__doc__)
@click.option("--prompt-tokens", default=256, show_default=True)
@click.option("--response-tokens", default=64, show_default=True)
@click.option("--batch-size", default=2, show_default=True)
@click.option("--steps", default=9, show_default=True, help="Of each variant, after two that are not counted.")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]))
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True, help="Of a step; the variants take turns.")
@click.option("--base", help="A checkpoint's folder. [default: the demo's base]")
@click.option("--out", default=ROOT / "out", type=click.Path(path_type=Path), show_default=False)
def main(base: str | None, out: Path, **options: Any) -> None:
    config = Config(base=base or str(prepare_base(out / "models")), warmup_steps=2, **options)
    console = Console()
    variants = [Variant(method, weights) for weights in WEIGHTS for method in METHODS]
    workers = [Worker(variant, config) for variant in variants]
    try:
        for worker in workers:
            worker.reply()  # loaded, one after another would only take longer
        samples: dict[Variant, list[float]] = {variant: [] for variant in variants}
        for step in track(range(config.warmup_steps + config.steps), "steps", console=console, transient=True):
            # Each turn begins with another variant.
            turn = workers[step % len(workers) :] + workers[: step % len(workers)]
            for worker in turn:
                taken = worker.ask("step")
                if step >= config.warmup_steps:
                    samples[worker.variant].append(taken)
        peaks = {worker.variant: worker.ask("peak") for worker in workers}
        base_bytes = workers[0].ask("base_bytes")
    finally:
        for worker in workers:
            worker.close()
    summary = {
        "question": "What does a training step cost, cache-conditioned against ordinary fine-tuning?",
        **describe_environment(("sglang-prefillshare", "torch", "transformers", "peft"), device=config.device),
        "config": asdict(config) | {"base": BASE_NAME if base is None else base},
        "base_bytes": base_bytes,
        **summarise(samples, peaks, base_bytes),
    }
    target = out / "bench" / "training" / "summary.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(summary, indent=2) + "\n")
    console.print(table(summary))
    console.print(f"written to {target}", highlight=False, soft_wrap=True)


def summarise(samples: dict[Variant, list[float]], peaks: dict[Variant, float], base_bytes: float) -> dict[str, Any]:
    """Medians, and for each kind of weights the ratio of the two methods over steps made side by side."""
    rows = [
        {
            "method": variant.method,
            "weights": variant.weights,
            "median_s": statistics.median(taken),
            "min_s": min(taken),
            "max_s": max(taken),
            "peak_bytes": peaks[variant],
            "samples_s": taken,
        }
        for variant, taken in samples.items()
    ]
    compared = {}
    for weights in WEIGHTS:
        ordinary, ours = (Variant(method, weights) for method in METHODS)
        ratios = [first / second for first, second in zip(samples[ordinary], samples[ours], strict=True)]
        compared[weights] = {
            "speedup": statistics.median(ratios),
            "speedup_min": min(ratios),
            "speedup_max": max(ratios),
            "more_bytes": peaks[ours] - peaks[ordinary],
            "allowed_more_bytes": base_bytes if weights == "full" else 0,
        }
    return {"compared": compared, "rows": rows}


def table(summary: dict[str, Any]) -> Table:
    config = summary["config"]
    drawn = Table(
        title=f"A step: {config['batch_size']} examples, prompt {config['prompt_tokens']}, response "
        f"{config['response_tokens']} tokens, {config['dtype']} on {config['device']}, {config['threads']} thread",
        caption=f"one frozen copy of the base: {summary['base_bytes'] / 1e6:,.0f} MB",
    )
    for heading in ("weights", "method", "median s", "min-max s", "peak MB", "speed-up", "min-max"):
        drawn.add_column(heading, justify="left" if heading in ("weights", "method") else "right")
    for row in summary["rows"]:
        cells = [row["weights"], row["method"], f"{row['median_s']:.2f}", f"{row['min_s']:.2f}-{row['max_s']:.2f}"]
        cells += [f"{row['peak_bytes'] / 1e6:,.0f}"]
        if row["method"] == "prefillshare":
            found = summary["compared"][row["weights"]]
            cells += [f"{found['speedup']:.2f}x", f"{found['speedup_min']:.2f}-{found['speedup_max']:.2f}"]
        drawn.add_row(*cells)
    return drawn


class Worker:
    """A process that makes steps of one variant when asked."""

    def __init__(self, variant: Variant, config: Config) -> None:
        self.variant = variant
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, variant, config), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, question: str) -> float:
        self._pipe.send(question)
        return self.reply()

    def reply(self) -> float:
        try:
            if self._pipe.poll(REPLY_TIMEOUT_S):
                answer: float = self._pipe.recv()
                return answer
        except EOFError:
            raise click.ClickException(f"the process of {self.variant.name} ended; see above.") from None
        raise click.ClickException(f"{self.variant.name} did not answer within {REPLY_TIMEOUT_S:.0f} s.")

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def serve(pipe: Connection, variant: Variant, config: Config) -> None:
    """In a worker: load, say so, then answer until the other end closes."""
    import torch

    torch.set_num_threads(config.threads)
    trained = Trained(variant, config)
    pipe.send(0.0)
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        if question == "step":
            started = time.perf_counter()
            trained.step()
            pipe.send(time.perf_counter() - started)
        elif question == "peak":
            pipe.send(peak_bytes(config.device))
        else:
            pipe.send(trained.base_bytes)


class Trained:
    """A module, its base and AdamW, as `prefillshare train` has them, without the Trainer around them."""

    def __init__(self, variant: Variant, config: Config) -> None:
        import torch

        from sglang_prefillshare.training.recipe import Data, Lora, Recipe, Source
        from sglang_prefillshare.training.run import add_adapter, load_model
        from sglang_prefillshare.training.trainer import BaseSource, frozen_copy, without_adapter

        self._is_shared = variant.method == "prefillshare"
        self._config = config
        self._random = np.random.default_rng(config.seed)
        self._module = load_model(config.base, config.dtype)
        self._base: BaseSource | None = None
        self.base_bytes = float(sum(weight.nbytes for weight in self._module.parameters()))
        if variant.weights == "lora":
            data = Data(train=(Source(path="none"),))
            lora = Lora(r=config.lora_rank)
            recipe = Recipe(base=config.base, output="none", data=data, weights="lora", lora=lora)
            self._module = add_adapter(self._module, recipe)
            self._base = without_adapter()
        elif self._is_shared:
            base = load_model(config.base, config.dtype).requires_grad_(False).eval().to(config.device)
            self._base = frozen_copy(base)
        self._module.to(config.device).train()
        self.weights = [weight for weight in self._module.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(self.weights, lr=1e-5)

    def step(self) -> None:
        """One optimizer step on a batch that is the same for every variant."""
        from sglang_prefillshare.training.loss import Example, base_prefill, collate, response_logits, token_losses

        examples = [self._example(Example) for _ in range(self._config.batch_size)]
        batch: Any = {name: tensor.to(self._config.device) for name, tensor in collate(examples).items()}
        prefix = None
        if self._is_shared and self._base is not None:
            with self._base(self._module) as base:
                prefix = base_prefill(base, batch)
        loss = token_losses(response_logits(self._module, batch, prefix), batch["labels"]).mean()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        loss.item()  # waits for a GPU

    def _example(self, make: Any) -> Any:
        prompt, response = (
            self._random.integers(0, self._module.config.vocab_size, count, dtype=np.int32)
            for count in (self._config.prompt_tokens, self._config.response_tokens)
        )
        return make(prompt, response, len(prompt) - 1 if self._is_shared else 0)


def peak_bytes(device: str) -> float:
    if device.startswith("cpu"):
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    import torch

    return float(torch.cuda.max_memory_allocated(device))


if __name__ == "__main__":
    main()
