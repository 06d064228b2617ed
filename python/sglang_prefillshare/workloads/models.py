"""Models for a benchmark: a base of any shape with random weights, and decode modules of it with weights of their own.

How long a forward pass takes depends on the shape and not on what the weights are, and answers have fixed lengths, so
random weights serve for speed. Nothing is downloaded. A folder appears under its final name only when it is complete,
and one that is there already is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.files import complete_or_absent, locked
from sglang_prefillshare.identity.fingerprint import identify_base
from sglang_prefillshare.identity.manifest import Manifest, write_manifest
from sglang_prefillshare.workloads.config import Models, RandomModel

RECIPE: Final = 1
"""Raise it with every change of what the folders hold."""

FIRST_WORD: Final = 260
"""Ids below are bytes and special tokens."""

_SPECIAL: Final = ("<|bos|>", "<|eos|>", "<|pad|>", "<|unk|>")


def prepare_models(models: Models) -> dict[str, Path]:
    """Folders by name: `base`, and each agent's. Random ones are made if they are not there yet."""
    if models.random is None:
        assert models.base is not None and isinstance(models.agents, dict)
        return {"base": Path(models.base)} | {name: Path(model) for name, model in models.agents.items()}
    return make_random_models(models.random, models.names)


def make_random_models(shape: RandomModel, agents: Sequence[str]) -> dict[str, Path]:
    """A base and a decode module for each agent; two calls at once are safe."""
    described = json.dumps({"recipe": RECIPE, **msgspec.to_builtins(shape), "folder": None}, sort_keys=True)
    digest = hashlib.blake2b(described.encode(), digest_size=4).hexdigest()
    folder = Path(shape.folder) / f"random-{shape.layers}x{shape.hidden_size}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        base = folder / "base"
        if not base.exists():
            with complete_or_absent(base) as partial:
                _write_model(shape, partial, seed=shape.seed)
        for place, agent in enumerate(agents):
            module = folder / agent
            if not module.exists():
                with complete_or_absent(module) as partial:
                    _write_model(shape, partial, seed=shape.seed + 1 + place)
                    identity = identify_base(base, cache_dir=folder / ".cache")
                    write_manifest(partial, Manifest.for_base("base", identity))
    return {"base": base} | {agent: folder / agent for agent in agents}


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
