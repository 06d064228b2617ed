"""Models for a benchmark: a base of any shape with random weights, and decode modules of it, whole or LoRA adapters.

How long a forward pass takes depends on the shape and not on what the weights are, and answers have fixed lengths, so
random weights serve for speed. Nothing is downloaded. A folder appears under its final name only when it is complete,
and one that is there already is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.files import complete_or_absent, locked
from sglang_prefillshare.identity.fingerprint import identify_base
from sglang_prefillshare.identity.manifest import Manifest, write_manifest
from sglang_prefillshare.workloads.config import ADAPTER_TOPOLOGIES, Benchmark, RandomModel, TopologyName

RECIPE: Final = 1
"""Raise it with every change of what the folders hold."""

FIRST_WORD: Final = 260
"""Ids below are bytes and special tokens."""

_ADAPTER_STD: Final = 0.02

_SPECIAL: Final = ("<|bos|>", "<|eos|>", "<|pad|>", "<|unk|>")


@dataclass(frozen=True, slots=True)
class ModelFolders:
    """Where the models lie: the base's, and by agent those of the kinds that the topologies need."""

    base: Path
    modules: Mapping[str, Path]
    adapters: Mapping[str, Path]

    def of(self, topology: TopologyName) -> dict[str, Path]:
        """By name: `base`, and each agent's as this topology serves it."""
        return {"base": self.base, **(self.adapters if topology in ADAPTER_TOPOLOGIES else self.modules)}


def prepare_models(benchmark: Benchmark) -> ModelFolders:
    """The benchmark's models. Random ones are made if they are not there yet."""
    models = benchmark.models
    if models.random is None:
        assert models.base is not None
        modules = models.agents if isinstance(models.agents, dict) else {}
        return ModelFolders(Path(models.base), _paths(modules), _paths(models.adapters or {}))
    return make_random_models(
        models.random,
        models.names,
        has_modules=benchmark.has_modules,
        has_adapters=benchmark.has_adapters,
    )


def _paths(folders: Mapping[str, str]) -> dict[str, Path]:
    return {name: Path(folder) for name, folder in folders.items()}


def make_random_models(
    shape: RandomModel, agents: Sequence[str], *, has_modules: bool = True, has_adapters: bool = False
) -> ModelFolders:
    """A base, and a decode module or an adapter or both for each agent; two calls at once are safe."""
    described = json.dumps({"recipe": RECIPE, **msgspec.to_builtins(shape), "folder": None}, sort_keys=True)
    digest = hashlib.blake2b(described.encode(), digest_size=4).hexdigest()
    folder = Path(shape.folder) / f"random-{shape.layers}x{shape.hidden_size}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        base = folder / "base"
        if not base.exists():
            with complete_or_absent(base) as partial:
                _write_model(shape, partial, seed=shape.seed)
        modules = {agent: folder / agent for agent in agents} if has_modules else {}
        adapters = {agent: folder / f"{agent}.adapter" for agent in agents} if has_adapters else {}
        for made, write in ((modules, _write_model), (adapters, _write_adapter)):
            for place, module in enumerate(made.values()):
                if not module.exists():
                    with complete_or_absent(module) as partial:
                        write(shape, partial, seed=shape.seed + 1 + place)
                        identity = identify_base(base, cache_dir=folder / ".cache")
                        write_manifest(partial, Manifest.for_base("base", identity))
    return ModelFolders(base, modules, adapters)


def token_id_range(model: Path) -> tuple[int, int]:
    """[low, high) of ordinary token ids: vocabularies keep special ones at their beginning or end."""
    try:
        config = json.loads((model / "config.json").read_text())
        vocab_size = int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"cannot read the vocabulary's size from {model}/config.json. Give the benchmark token_ids: [LOW, HIGH]."
        ) from error
    return min(FIRST_WORD, vocab_size // 8), vocab_size * 7 // 8


def parameter_count(shape: RandomModel) -> int:
    """Weights of one model; the head is the embedding's transpose."""
    head_dim = shape.hidden_size // shape.heads
    attention = shape.hidden_size * head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size
    return shape.layers * layer + shape.vocab_size * shape.hidden_size + shape.hidden_size


def _write_model(shape: RandomModel, folder: Path, *, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = _tokenizer(shape.vocab_size)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden_size // shape.heads,
        max_position_embeddings=shape.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=shape.dtype,
    )
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a CPU takes minutes for billions of numbers
        model = LlamaForCausalLM(config).to(getattr(torch, shape.dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_adapter(shape: RandomModel, folder: Path, *, seed: int) -> None:
    """As PEFT writes it, on every product of every layer."""
    import torch
    from safetensors.torch import save_file

    head_dim = shape.hidden_size // shape.heads
    hidden, inner = shape.hidden_size, shape.intermediate_size
    products = {
        "self_attn.q_proj": (hidden, shape.heads * head_dim),
        "self_attn.k_proj": (hidden, shape.kv_heads * head_dim),
        "self_attn.v_proj": (hidden, shape.kv_heads * head_dim),
        "self_attn.o_proj": (shape.heads * head_dim, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    generator = torch.Generator().manual_seed(seed)
    rank, dtype = shape.lora_rank, getattr(torch, shape.dtype)
    weights = {}
    for layer in range(shape.layers):
        for name, (inputs, outputs) in products.items():
            for part, size in (("A", (rank, inputs)), ("B", (outputs, rank))):
                key = f"base_model.model.model.layers.{layer}.{name}.lora_{part}.weight"
                weights[key] = (_ADAPTER_STD * torch.randn(size, generator=generator)).to(dtype)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(name.rpartition(".")[2] for name in products),
        "base_model_name_or_path": "base",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, folder / "adapter_model.safetensors")


def _tokenizer(vocab_size: int) -> Any:
    """Bytes, four special tokens, and words that text never becomes but ids may name."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    assert len(words) == FIRST_WORD
    words += [f"w{index}" for index in range(len(words), vocab_size)]
    backend = Tokenizer(tokenizer_models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bos, eos, pad, unknown = _SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unknown
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    )
    return tokenizer
