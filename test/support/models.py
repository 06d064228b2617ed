"""Tiny real checkpoints: a base, decode modules of the same architecture, and a tokenizer, as Transformers saves them.

The weights are random, yet their greedy answers are worth comparing token for token: attention over the context
decides the next token (so that KV of the wrong model, or a position off by one, changes the answer), answers wander
instead of repeating one token, special tokens are never chosen, and the best logit leads by thousands of times the
float32 noise (near ties remain possible: `test.support.oracle.clear_prompt` steers around them). `test_oracle.py` holds
these properties.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sglang_prefillshare.identity.fingerprint import identify_base
from sglang_prefillshare.identity.manifest import Manifest, write_manifest
from test.support.device import DTYPE, HEAD_DIM

Arch = Literal["llama", "qwen3"]

VOCAB_SIZE = 512
PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_STD = 0.15
SPECIAL_TOKENS = ("<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
BOS, EOS, PAD = SPECIAL_TOKENS[0], SPECIAL_TOKENS[2], SPECIAL_TOKENS[3]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TOKENIZER_TEXT = """
A planner splits the question into steps, a coder writes a function for each step, and a reviewer reads the answer.
The base model reads the shared prompt once. Every decode module starts from the same keys and values, takes the last
token of the prompt as its first input, and writes its own answer: system, user, assistant and tool take turns.
When the conversation grows, only the new tokens are computed; the prefix that all agents share stays where it is.
Which numbers between 1 and 20 are prime? 2, 3, 5, 7, 11, 13, 17 and 19. What is the capital of France? Paris.
def add(first: int, second: int) -> int:
    return first + second
for index in range(10):
    print(index, {"name": "value", "items": [1, 2, 3]}, 'text')
class Session:
    def __init__(self, messages): self.messages = list(messages)
Please answer in one short sentence, then explain why. Remember that tests should fail when the code is wrong!
"""


def make_base(
    folder: str | Path,
    arch: Arch = "llama",
    *,
    tied: bool = False,
    seed: int = 0,
    layers: int = 3,
    head_dim: int = HEAD_DIM,
    max_position_embeddings: int = 4096,
) -> Path:
    """Write a base of `layers` layers (hidden 4 x `head_dim`, 4 heads, 2 KV heads) with its tokenizer."""
    tokenizer = make_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 4 * head_dim,
        "intermediate_size": 8 * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model: PreTrainedModel
    model = LlamaForCausalLM(LlamaConfig(**settings)) if arch == "llama" else Qwen3ForCausalLM(Qwen3Config(**settings))
    model.load_state_dict(_random_weights(model, seed), strict=not tied)
    _save(model, tokenizer, Path(folder))
    return Path(folder)


def make_decode_module(
    folder: str | Path,
    base_folder: str | Path,
    *,
    seed: int,
    change: float = 0.6,
    manifest: bool = True,
) -> Path:
    """Write a decode module of the base's architecture and tokenizer with every weight changed.

    `change` is the share of the new weights' norm that does not come from the base: 0 copies it, 1 is unrelated.
    With `manifest` the folder says that it was trained on this base; without, nothing is claimed.
    """
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    fresh = _random_weights(model, seed)
    own = model.state_dict()
    mixed = {name: (1 - change**2) ** 0.5 * own[name] + change * weight for name, weight in fresh.items()}
    model.load_state_dict(mixed, strict=False)
    _save(model, PreTrainedTokenizerFast.from_pretrained(base_folder), Path(folder))
    if manifest:
        _write_manifest(folder, base_folder)
    return Path(folder)


def make_adapter(
    folder: str | Path, base: str | Path, *, seed: int, rank: int = 4, targets: Sequence[str] = PRODUCTS
) -> Path:
    """Write a LoRA adapter of `base` with random weights, large enough to change answers, and its manifest."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=ADAPTER_STD)
    model.save_pretrained(str(folder))
    write_manifest(folder, Manifest.for_base("tiny", identify_base(base)))
    return Path(folder)


def make_equal_module(folder: str | Path, base_folder: str | Path, *, manifest: bool = True) -> Path:
    """Write a decode module with the base's own weights: it must answer as the base alone would."""
    shutil.copytree(base_folder, folder, dirs_exist_ok=True)
    if manifest:
        _write_manifest(folder, base_folder)
    return Path(folder)


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly `VOCAB_SIZE` tokens that encodes any text and has a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call, unused-ignore]
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_TOKENIZER_TEXT], trainer)
    assert backend.get_vocab_size() == VOCAB_SIZE, backend.get_vocab_size()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def sample_prompt(tokens: int, *, seed: int = 0) -> list[int]:
    """Random ordinary token ids, `tokens` of them."""
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(len(SPECIAL_TOKENS), VOCAB_SIZE, (tokens,), generator=generator)]


def _random_weights(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """Weights whose attention is peaked and outweighs the token's own embedding; see the module's docstring."""
    generator = torch.Generator().manual_seed(seed)
    gains = {"q_proj": 1.3, "k_proj": 1.3, "v_proj": 2.0, "o_proj": 2.0, "embed_tokens": 0.3}
    weights = {}
    for name, old in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        noise = torch.randn(old.shape, generator=generator)
        part = name.split(".")[-2]
        if old.dim() == 1:
            center = 1.3 if part in ("q_norm", "k_norm") else 1.0
            weights[name] = center + 0.1 * noise
            continue
        fan_in = 1 if part == "embed_tokens" else old.shape[1]
        weights[name] = gains.get(part, 1.0) * noise / fan_in**0.5
        if part in ("embed_tokens", "lm_head"):
            weights[name][: len(SPECIAL_TOKENS)] *= 0.1  # never the best logit
    return weights


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.to(DTYPE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_manifest(folder: str | Path, base_folder: str | Path) -> None:
    identity = identify_base(base_folder, cache_dir=Path(base_folder) / ".identity-cache")
    write_manifest(folder, Manifest.for_base(Path(base_folder).name, identity))
