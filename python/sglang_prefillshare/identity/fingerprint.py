"""Content identity of a base (contract 4): what its KV depends on, in four digests and two names made of them.

The four parts are kept apart so that a refusal can say which of them differs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from sglang_prefillshare.errors import ConfigError, IdentityError
from sglang_prefillshare.identity.canonical import canonical_json, digest_json, read_json_object
from sglang_prefillshare.identity.folder import locate_model
from sglang_prefillshare.identity.tokenizer import TokenizerIdentity, tokenizer_identity
from sglang_prefillshare.identity.weights import weights_digest

__all__ = ["BaseIdentity", "TokenizerIdentity", "check_tokenizer", "identify_base", "read_config", "tokenizer_identity"]

MODEL_PREFIX: Final = "psb1"  # PrefillShare base, version 1 of the recipe
RUNTIME_PREFIX: Final = "psk1"  # PrefillShare KV, version 1

_NOT_IN_KV: Final = frozenset(
    {
        # Where the file came from and what wrote it.
        "_name_or_path", "_commit_hash", "transformers_version", "auto_map", "name_or_path",
        # How it is stored or run: the stored dtype is in the weights' digest, the KV's in `runtime_fingerprint`.
        "dtype", "torch_dtype", "use_cache", "attn_implementation", "_attn_implementation",
        "_attn_implementation_autoset", "_attn_implementation_internal", "_experts_implementation", "use_flash_attn",
        "torchscript", "pretraining_tp", "gradient_checkpointing",
        # What a forward pass returns besides logits.
        "output_attentions", "output_hidden_states", "return_dict", "use_return_dict",
        "chunk_size_feed_forward", "tie_encoder_decoder",
        # Training only.
        "initializer_range", "attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop",
        "residual_dropout", "router_aux_loss_coef", "output_router_logits",
        # Heads that are not for generation.
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
        # Generation, which the base takes no part in. What of it reaches a prompt is in the tokenizer's digest.
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id",
        "prefix", "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams",
        "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
        "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
        "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
        "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens",
    }
)  # fmt: skip
"""Keys of config.json that cannot change a key or value vector. A key not listed here counts: an unknown one may."""

_KV_DTYPES: Final = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32",
    "float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """Hex digests of everything that decides a base's KV for a given request."""

    weights: str
    config: str
    tokenizer: str
    chat_template: str

    @property
    def model_fingerprint(self) -> str:
        """One name for this base, the same wherever and under whatever name it is stored."""
        parts = canonical_json([MODEL_PREFIX, dataclasses.asdict(self)])
        return f"{MODEL_PREFIX}-{blake3(parts).hexdigest(16)}"

    def runtime_fingerprint(self, kv_dtype: str) -> str:
        """The name of the KV that this base writes in `kv_dtype`; "auto" must be resolved before."""
        name = kv_dtype.removeprefix("torch.").lower()
        if name in ("", "auto"):
            raise ConfigError(f"KV dtype is {kv_dtype!r}, wanted a resolved one such as bfloat16.")
        parts = canonical_json([RUNTIME_PREFIX, self.model_fingerprint, _KV_DTYPES.get(name, name)])
        return f"{RUNTIME_PREFIX}-{blake3(parts).hexdigest(16)}"

    def differing_parts(self, other: BaseIdentity) -> list[str]:
        """Names of the parts in which two bases differ."""
        names = [field.name for field in dataclasses.fields(self)]
        return [name for name in names if getattr(self, name) != getattr(other, name)]


def identify_base(
    model_path: str | Path,
    *,
    tokenizer_path: str | Path | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
) -> BaseIdentity:
    """Read a base and say who it is. The arguments are SGLang's flags of the same names.

    The weights are read once and their digest is remembered in `cache_dir` (default `~/.cache/prefillshare`) for as
    long as the files stay as they are. Raises `ConfigError` when the path is no model, `IdentityError` when a file
    of it is damaged or unreadable.
    """
    model = locate_model(model_path, revision=revision)
    tokens = tokenizer_identity(
        model if tokenizer_path is None else tokenizer_path,
        chat_template=chat_template,
        revision=revision if tokenizer_path is None else None,
    )
    config = read_config(model)  # before the weights: a wrong path should fail before gigabytes are read
    weights = weights_digest(model, cache_dir=cache_dir)
    return BaseIdentity(weights, digest_json(_kv_part(config)), tokens.tokenizer, tokens.chat_template)


def read_config(model_path: str | Path) -> dict[str, Any]:
    """config.json of a model. A GGUF file carries its configuration inside, under the weights' digest: empty here."""
    model = locate_model(model_path)
    if model.is_file():
        return {}
    config = model / "config.json"
    if not config.is_file():
        raise ConfigError(f"{model} has no config.json. Give the folder of a whole model.")
    return read_json_object(config)


def check_tokenizer(
    module_path: str | Path,
    base: BaseIdentity,
    *,
    chat_template: str | None = None,
    revision: str | None = None,
) -> TokenizerIdentity:
    """Return a decode module's tokenizer identity; raise `IdentityError` if it would tokenize otherwise than the base.

    `module_path` is where the module's tokenizer is taken from: its folder, or its --tokenizer-path.
    """
    own = tokenizer_identity(module_path, chat_template=chat_template, revision=revision)
    if own.tokenizer != base.tokenizer:
        raise IdentityError(
            f"the tokenizer of {module_path} ({own.tokenizer[:12]}) differs from the base's ({base.tokenizer[:12]}): "
            "the prompt's token ids would not be those the base prefilled. Start this decode module with "
            "--tokenizer-path BASE, or fine-tune it with the base's tokenizer."
        )
    if own.chat_template != base.chat_template:
        raise IdentityError(
            f"the chat template of {module_path} ({own.chat_template[:12]}) differs from the base's "
            f"({base.chat_template[:12]}): a conversation would become other tokens than the base prefilled. "
            "Give prefill and decode one template with --chat-template FILE, or use the base's tokenizer folder."
        )
    return own


def _kv_part(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the keys that cannot change KV, in nested configs (`text_config`, …) too."""
    return {
        key: _kv_part(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NOT_IN_KV
    }
