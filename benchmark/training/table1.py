"""The paper's Table 1, small: is a module that reads the base's KV as right as an ordinarily fine-tuned one?

Planner, coder and reviewer of the demo are trained from SmolLM2-135M-Instruct, each with both methods: the same data in
the same order, the same steps, learning rate and adapter. Questions are about combinations that training never asked;
a plan is right as an exact match, code where it computes what was asked. Ordinary fine-tuning is also measured where
the base prefills its prompts: the paper's naive sharing.

Every run is kept in out/table1/; what is there already is not made again. Writes out/table1/table.json, of all runs
that are kept there.

    python benchmark/training/table1.py --seeds 3 --jobs 2 --method full_ft --method prefillshare_2x
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final, get_args

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.demo.exercises import Split, comparison  # noqa: E402
from examples.demo.models import ADAPTERS, BASE_NAME, prepare_base  # noqa: E402
from examples.demo.rounds import ROLES, Role, examples  # noqa: E402
from sglang_prefillshare.environment import describe_environment  # noqa: E402
from sglang_prefillshare.evaluation.sandbox import check_sandbox, run_python  # noqa: E402
from sglang_prefillshare.identity.fingerprint import identify_base  # noqa: E402
from sglang_prefillshare.identity.manifest import Manifest, write_manifest  # noqa: E402

PER_DEVICE: Final = 4  # examples at once, as in the recipe

STEPS: Final[dict[Role, int]] = {"planner": 240, "coder": 160, "reviewer": 160}
"""The planner alone hears the request in words that it never heard before, and learns for longer."""

LONG_STEPS: Final[dict[Role, int]] = {"planner": 800, "coder": 1200, "reviewer": 1200}
"""Steps of half the batch, on examples of which none occurs twice."""


@dataclass(frozen=True, slots=True)
class Method:
    """What the recipe does, and for how long."""

    of_recipe: str
    epochs: int = 1
    is_long: bool = False

    @property
    def data(self) -> str:
        return "long" if self.is_long else "train"

    @property
    def batch_size(self) -> int:
        return PER_DEVICE * self.accumulation

    @property
    def accumulation(self) -> int:
        return 1 if self.is_long else 2

    def examples(self, role: Role) -> int:
        """How many different ones."""
        return self.batch_size * self.steps(role) // self.epochs

    def steps(self, role: Role) -> int:
        return self.epochs * (LONG_STEPS if self.is_long else STEPS)[role]


METHODS: Final = {
    "full_ft": Method("full-ft"),
    "prefillshare": Method("prefillshare"),
    "full_ft_2x": Method("full-ft", epochs=2),
    "prefillshare_2x": Method("prefillshare", epochs=2),
    "prefillshare_4x": Method("prefillshare", epochs=4),
    "full_ft_long": Method("full-ft", is_long=True),
    "prefillshare_long": Method("prefillshare", is_long=True),
}
"""What the result calls a method. A step of prefillshare costs half of full-ft's here: `prefillshare_2x` was given as
much time as `full_ft`, and as many steps as `full_ft_2x`, whose time `prefillshare_4x` was given. Both that are called
long have as many steps, and enough of them that more would teach either little."""

DEMO_METHOD: Final = "prefillshare_long"
"""The demo serves this one's modules."""

SCORES: Final = ("accuracy", "exact_match")

OWN_KV: Final = 0.0
BASE_KV: Final = 1.0

MEASURED: Final = {"prefillshare": (BASE_KV,), "full-ft": (OWN_KV, BASE_KV)}
"""At which shares of base KV the modules of a recipe's method are measured."""

TEST_COUNT: Final = 200
ANSWER_TOKENS: Final = 64  # three times as long as any that is wanted
KEEP_MEMORY: Final = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
"""glibc gives every step's activations back to the kernel and has them zeroed again: a tenth of the time."""

RECIPE: Final = Path(__file__).with_suffix(".yaml")


CARD: Final = """# {role}: a decode module of {base}

A LoRA adapter (rank 4) that reads the KV of {base} (Apache-2.0) and answers as the demo's {role}: requests about lists,
made by `examples/demo/exercises.py`. It is good for nothing else.

Trained by `python benchmark/training/table1.py --method {method}`: {steps} steps on {train_count} examples,
cache-conditioned (eq. 7), seed 0, on one thread of an {device} ({seconds:.0f} s).
Of {test_count} questions about combinations that training never asked it answers {accuracy:.1f}% right.
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One module: trained, then measured."""

    role: Role
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.role}-{self.method}-{self.seed}"

    @property
    def shares(self) -> tuple[float, ...]:
        return MEASURED[METHODS[self.method].of_recipe]

    @classmethod
    def named(cls, name: str) -> Run:
        role, method, seed = name.split("-")
        assert role in get_args(Role) and method in METHODS
        return cls(role, method, int(seed))  # type: ignore[arg-type]


@click.command(help=__doc__)
@click.option("--seeds", default=1, show_default=True, envvar="SEEDS", type=click.IntRange(1), help="Or SEEDS=n.")
@click.option("--jobs", default=1, show_default=True, help="Runs at the same time, of one thread each.")
@click.option("--role", "roles", type=click.Choice(ROLES), multiple=True, help="[default: all]")
@click.option(
    "--method",
    "methods",
    type=click.Choice(list(METHODS)),
    multiple=True,
    default=["full_ft", "prefillshare", "prefillshare_2x"],
    show_default=True,
)
@click.option("--out", default=ROOT / "out" / "table1", type=click.Path(path_type=Path), show_default=False)
@click.option("--write-adapters", is_flag=True, help="Put the adapters of seed 0 where the demo finds its modules.")
@click.option("--only", hidden=True, help="Make one run, in this process.")
def main(
    seeds: int,
    jobs: int,
    roles: tuple[Role, ...],
    methods: tuple[str, ...],
    out: Path,
    write_adapters: bool,
    only: str | None,
) -> None:
    if write_adapters and DEMO_METHOD not in methods:
        raise click.UsageError(f"--write-adapters writes modules of {DEMO_METHOD}, and --method leaves it out. Add it.")
    check_sandbox()  # in which answers run, hours from now
    base = prepare_base(ROOT / "out" / "models")
    if only is not None:
        make(Run.named(only), base, out)
        return
    console = Console()
    started = time.monotonic()
    write_data(out)
    runs = [Run(role, method, seed) for seed in range(seeds) for role in roles or ROLES for method in methods]
    with ThreadPoolExecutor(jobs) as pool:
        for run, result in zip(runs, pool.map(lambda run: made(run, out), runs), strict=True):
            shares = ", ".join(f"{100 * value:.1f} at {share}" for share, value in result["accuracy"].items())
            console.print(f"{run.name:24} {shares}, {result['train_seconds']:.0f} s of training", highlight=False)
    summary = {
        "question": "Is a module that reads the base's KV as right as an ordinarily fine-tuned one?",
        **describe_environment(("sglang-prefillshare", "torch", "transformers", "peft")),
        "base": BASE_NAME,
        "recipe": RECIPE.read_text(),
        "steps": {name: {role: method.steps(role) for role in ROLES} for name, method in METHODS.items()},
        "test_questions": TEST_COUNT,
        "jobs": jobs,
        "seconds": round(time.monotonic() - started, 1),
        **summarise({run: result_of(run, out) for run in kept(out)}),
    }
    (out / "table.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print(table(summary))
    console.print(f"written to {out / 'table.json'}", highlight=False, soft_wrap=True)
    if write_adapters:
        for role in roles or ROLES:
            write_adapter(out / Run(role, DEMO_METHOD, 0).name, base, summary, role=role)
            console.print(f"written to {ADAPTERS / role}", highlight=False, soft_wrap=True)


def write_data(out: Path) -> None:
    """The roles' data, the same in every run: of a run's seed only the weights, the order and the shares depend."""
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for role in ROLES:
        counts = {method.data: method.examples(role) for method in METHODS.values()} | {"test": TEST_COUNT}
        for name, count in counts.items():
            split: Split = "test" if name == "test" else "train"
            lines = [json.dumps(record) for record in examples(role, split, count=count, seed=0)]
            (folder / f"{role}.{name}.jsonl").write_text("\n".join(lines) + "\n")


def made(run: Run, out: Path) -> dict[str, Any]:
    """The result of a run, made in a process of its own unless it is there."""
    if not (out / run.name / "result.json").is_file():
        command = [sys.executable, __file__, "--out", str(out), "--only", run.name]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **KEEP_MEMORY}
        with open(out / f"{run.name}.log", "w") as log:
            if subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT).returncode != 0:
                raise click.ClickException(f"{run.name} failed. Its log: {log.name}")
    return result_of(run, out)


def kept(out: Path) -> list[Run]:
    """The runs whose results are there."""
    return [Run.named(path.parent.name) for path in sorted(out.glob("*-*-*/result.json"))]


def result_of(run: Run, out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / run.name / "result.json").read_text())
    return result


def make(run: Run, base: Path, out: Path) -> None:
    """Train a module and measure it."""
    from sglang_prefillshare.training.run import train

    folder, data = out / run.name, out / "data"
    method = METHODS[run.method]
    began = time.monotonic()
    summary = train(
        RECIPE,
        (
            f"base={base}",
            f"output={folder}",
            "overwrite=true",
            f"data.train={data / f'{run.role}.{method.data}.jsonl'}",
            f"method={method.of_recipe}",
            f"training.max_steps={method.steps(run.role)}",
            f"training.gradient_accumulation_steps={method.accumulation}",
            f"training.seed={run.seed}",
        ),
    )
    store_in_bfloat16(folder)
    train_seconds = time.monotonic() - began
    questions = [json.loads(line) for line in (data / f"{run.role}.test.jsonl").read_text().splitlines()]
    began_measuring = time.monotonic()
    answers = answers_of(folder, base, questions, shares=run.shares)
    wanted = [question["answer"] for question in questions]
    result = {
        "answers": {str(share): texts for share, texts in answers.items()},
        **score(run.role, answers, wanted),
        "train_loss": summary.metrics["train_loss"],
        "train_seconds": round(train_seconds, 1),
        "measure_seconds": round(time.monotonic() - began_measuring, 1),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")


def answers_of(
    module: Path, base: Path, questions: Sequence[Mapping[str, Any]], *, shares: Sequence[float]
) -> dict[float, list[str | None]]:
    """What a module answers in float32 at each share of base KV; None where it does not come to an end."""
    from sglang_prefillshare.evaluation.answers import Ask, answer_offline, tokenise_asks
    from sglang_prefillshare.training.modules import open_modules

    opened = open_modules({module.name: str(module)}, base=str(base), dtype="float32")
    asks = [Ask(str(place), question["prompt"], ANSWER_TOKENS) for place, question in enumerate(questions)]
    prompts = tokenise_asks(asks, opened)
    ((_, evaluator),) = opened.evaluators(batch_size=32)
    return {
        share: [
            None if answer.is_cut else answer.text
            for answer in answer_offline(asks, prompts, evaluator, opened, share=share)
        ]
        for share in shares
    }


def score(role: Role, answers: Mapping[float, Sequence[str | None]], wanted: Sequence[str]) -> dict[str, Any]:
    """The share of right answers at each share of base KV, and that of exact matches."""
    right, exact = {}, {}
    for share, texts in answers.items():
        pairs = list(zip(texts, wanted, strict=True))
        right[str(share)] = fmean(is_right(role, text, answer) for text, answer in pairs)
        exact[str(share)] = fmean(text == answer for text, answer in pairs)
    return {"accuracy": right, "exact_match": exact}


def is_right(role: Role, answer: str | None, wanted: str) -> bool:
    """Whether an answer is the plan that is wanted, or code that computes what is wanted: `set(x for x in xs)` is as
    right as `set(xs)`. What a model wrote runs sandboxed."""
    if answer is None or answer == wanted or role == "planner":
        return answer == wanted
    return run_python(comparison(answer, wanted)).is_right


def store_in_bfloat16(adapter: Path) -> None:
    """Halve an adapter's file, before it is measured: adapters of this size may lie in a repository."""
    import torch
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    weights = {name: weight.to(torch.bfloat16) for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def write_adapter(trained: Path, base: Path, summary: dict[str, Any], *, role: Role) -> None:
    """Copy an adapter to the demo's. It names its base as people know it, not by where it lay."""
    folder = ADAPTERS / role
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(trained / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    config = json.loads((trained / "adapter_config.json").read_text()) | {"base_model_name_or_path": BASE_NAME}
    config["target_modules"].sort()  # PEFT writes a set
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_manifest(folder, Manifest.for_base(BASE_NAME, identify_base(base)))
    result = summary["runs"][trained.name]
    card = CARD.format(
        role=role,
        base=BASE_NAME,
        method=DEMO_METHOD,
        steps=METHODS[DEMO_METHOD].steps(role),
        train_count=METHODS[DEMO_METHOD].examples(role),
        test_count=summary["test_questions"],
        accuracy=100 * result["accuracy"]["1.0"],
        seconds=result["train_seconds"],
        device=summary["device"]["name"],
    )
    (folder / "README.md").write_text(card)


def summarise(results: Mapping[Run, dict[str, Any]]) -> dict[str, Any]:
    """Scores by role, as means over seeds and for each seed. A method that was not run is left out."""
    roles: dict[str, Any] = {}
    for role in ROLES:
        per_seed: dict[str, dict[str, list[float]]] = {measured: {} for measured in SCORES}
        for run, result in results.items():
            if run.role == role:
                for measured in SCORES:
                    for share in run.shares:
                        name = f"{run.method}_at_{share:g}"
                        per_seed[measured].setdefault(name, []).append(result[measured][str(share)])
        if per_seed["accuracy"]:
            roles[role] = {
                measured: {
                    "mean": {name: fmean(values) for name, values in per_seed[measured].items()},
                    "per_seed": per_seed[measured],
                }
                for measured in SCORES
            }
    return {"roles": roles, "runs": {run.name: result for run, result in results.items()}}


def table(summary: dict[str, Any]) -> Table:
    """A row for each method that a role was trained with."""
    drawn = Table(title=f"Right answers, and exact matches, % of {summary['test_questions']}")
    drawn.add_column("role")
    drawn.add_column("method")
    for title in ("steps", "batch", "own KV", "base KV", "exact, own KV", "exact, base KV"):
        drawn.add_column(title, justify="right")
    for role, found in summary["roles"].items():
        for name, method in METHODS.items():
            cells = [
                _cell(found[measured]["per_seed"].get(f"{name}_at_{share:g}", []))
                for measured in SCORES
                for share in (OWN_KV, BASE_KV)
            ]
            if any(cells):
                drawn.add_row(role, name, str(method.steps(role)), str(method.batch_size), *cells)
        drawn.add_section()
    return drawn


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ({100 * min(values):.1f}-{100 * max(values):.1f})" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
