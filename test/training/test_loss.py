from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config

from sglang_prefillshare.errors import ConfigError, PrefillShareError
from sglang_prefillshare.training.loss import (
    BasePrefix,
    Example,
    base_prefill,
    cache_conditioned_loss,
    check_plain_attention,
    collate,
    keep_prefix_under_checkpointing,
    response_logits,
)
from test.support.models import Arch, sample_prompt
from test.support.oracle import base_cache, generate, load_model
from test.training.toys import examples, gradients, weights

KINDS = [("llama", False), ("llama", True), ("qwen3", False), ("qwen3", True)]


def ordinary_loss(model: PreTrainedModel, examples: Sequence[Example]) -> torch.Tensor:
    """The loss on the response of whole sequences, one at a time, unpadded and without a cache. K and V of the tokens
    that the base computes are cut off from the gradients where the model makes them."""
    total = torch.zeros(())
    for example in examples:
        ids = torch.from_numpy(np.concatenate([example.prompt, example.response]).astype(np.int64))[None]

        def cut(_module: Any, _inputs: Any, output: torch.Tensor, count: int = example.base_tokens) -> torch.Tensor:
            return torch.cat([output[:, :count].detach(), output[:, count:]], dim=1)

        with ExitStack() as hooks:
            for name, part in model.named_modules():
                last_of_keys = "k_norm" if model.config.model_type == "qwen3" else "k_proj"
                if name.endswith((last_of_keys, "v_proj")):
                    hooks.callback(part.register_forward_hook(cut).remove)
            logits = model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, len(example.prompt) :], reduction="sum")
    return total / sum(len(example.response) for example in examples)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("arch", "tied"), KINDS)
def test_with_the_bases_own_weights_loss_and_gradients_equal_the_ordinary_ones(
    folders: dict[tuple[Arch, bool], Path], arch: Arch, tied: bool, share: float
) -> None:
    base = load_model(folders[arch, tied]).requires_grad_(False)
    module = load_model(folders[arch, tied]).train()
    wanted = ordinary_loss(module, examples(share))
    wanted.backward()
    wanted_gradients = gradients(module)
    module.zero_grad()

    loss = cache_conditioned_loss(module, base, collate(examples(share)))
    loss.backward()

    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(module), wanted_gradients, atol=1e-5, rtol=1e-5)


def test_another_module_is_scored_on_the_bases_kv_token_by_token(
    base: PreTrainedModel, module: PreTrainedModel
) -> None:
    """Against the oracle's way: one token at a time, appended to the base's cache."""
    total = 0.0
    for example in examples():
        cache = base_cache(base, [int(token) for token in example.prompt[:-1]])
        fed = [int(example.prompt[-1]), *(int(token) for token in example.response[:-1])]
        for token, label in zip(fed, example.response, strict=True):
            with torch.no_grad():
                logits = module(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]
            total -= float(logits.log_softmax(-1)[int(label)])
    wanted = total / sum(len(example.response) for example in examples())

    loss = cache_conditioned_loss(module, base, collate(examples()))

    assert loss.item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(("arch", "tied"), KINDS)
def test_greedy_generation_from_the_base_kv_is_what_the_training_logits_say(
    folders: dict[tuple[Arch, bool], Path], arch: Arch, tied: bool
) -> None:
    base = load_model(folders[arch, tied])
    module = load_model(folders[arch, tied])
    with torch.no_grad():
        for number, weight in enumerate(module.parameters()):
            generator = torch.Generator().manual_seed(number)
            weight += 0.2 * weight.std().nan_to_num(0.1) * torch.randn(weight.shape, generator=generator)
    prompts = [sample_prompt(count, seed=count) for count in (11, 2, 6)]
    answers = [generate(base, module, prompt, 8).token_ids for prompt in prompts]
    batch = collate(
        [
            Example(np.asarray(prompt, np.int32), np.asarray(answer, np.int32), len(prompt) - 1)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    )

    with torch.no_grad():
        chosen = response_logits(module, batch, base_prefill(base, batch)).argmax(dim=-1)

    assert chosen.tolist() == answers


def test_the_base_gets_no_gradient_and_stays_bit_identical(module: PreTrainedModel, base_folder: Path) -> None:
    base = load_model(base_folder)  # gradients not switched off: the loss itself must keep them away
    before = weights(base)
    optimizer = torch.optim.AdamW([*base.parameters(), *module.parameters()], lr=1e-2, weight_decay=0.0)

    cache_conditioned_loss(module, base, collate(examples())).backward()
    optimizer.step()

    assert all(weight.grad is None for weight in base.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    assert all(weight.grad is not None for weight in module.parameters())


def test_a_prefix_is_read_any_number_of_times_and_never_written(base: PreTrainedModel, module: PreTrainedModel) -> None:
    batch = collate(examples())
    prefix = base_prefill(base, batch)
    assert isinstance(prefix, BasePrefix)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prefix.layers]

    first = response_logits(module, batch, prefix)
    second = response_logits(module, batch, prefix)

    assert torch.equal(first, second)
    for layer, (keys, values) in zip(prefix.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        assert not layer.keys.requires_grad and not layer.values.requires_grad


def test_the_base_runs_without_dropout_and_keeps_its_mode(base: PreTrainedModel) -> None:
    base.train()
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    batch = collate(examples())
    first, second = base_prefill(base, batch), base_prefill(base, batch)
    assert first is not None and second is not None
    assert torch.equal(first.layers[1].keys, second.layers[1].keys)
    assert base.training


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_padding_changes_nothing(base: PreTrainedModel, module: PreTrainedModel, share: float) -> None:
    alone = torch.stack(
        [cache_conditioned_loss(module, base, collate([example]), num_items=1) for example in examples(share)]
    ).sum()
    for padding in ("left", "right"):
        for wider in (0, 40):
            batch = collate(examples(share), context_padding=padding, min_context=wider, pad_id=7)  # type: ignore[arg-type]
            loss = cache_conditioned_loss(module, base, batch, num_items=1)
            torch.testing.assert_close(loss, alone, atol=1e-4, rtol=1e-5)


def test_an_example_without_base_tokens_is_right_beside_others(base: PreTrainedModel, module: PreTrainedModel) -> None:
    mixed = [*examples(1.0)[:2], *examples(0.0)[2:]]
    alone = torch.stack([cache_conditioned_loss(module, base, collate([example]), num_items=1) for example in mixed])
    together = cache_conditioned_loss(module, base, collate(mixed), num_items=1)
    torch.testing.assert_close(together, alone.sum(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    base: PreTrainedModel, module: PreTrainedModel, share: float, reentrant: bool
) -> None:
    batch = collate(examples(share))
    cache_conditioned_loss(module, base, batch).backward()
    wanted = gradients(module)
    module.zero_grad()
    module.gradient_checkpointing_enable({"use_reentrant": reentrant})
    keep_prefix_under_checkpointing(module)
    calls = count_calls(module.model.layers[0].self_attn)

    cache_conditioned_loss(module, base, batch).backward()

    assert len(calls) == 2, "the layer was not computed again, so nothing was checkpointed"
    torch.testing.assert_close(gradients(module), wanted, atol=1e-6, rtol=1e-5)


def test_checkpointing_that_drops_the_base_kv_is_refused(base: PreTrainedModel, module: PreTrainedModel) -> None:
    module.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(PrefillShareError, match="would take the base's KV away"):
        cache_conditioned_loss(module, base, collate(examples()))


def test_bf16_autocast_is_close_and_reaches_every_weight(base: PreTrainedModel, module: PreTrainedModel) -> None:
    batch = collate(examples())
    wanted = cache_conditioned_loss(module, base, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cache_conditioned_loss(module, base.to(torch.bfloat16), batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=0.03)
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in module.parameters())


def test_logits_are_computed_for_the_response_only(base: PreTrainedModel, module: PreTrainedModel) -> None:
    batch = collate(examples(0.0, lengths=((50, 3), (20, 2))))
    assert response_logits(module, batch, None).shape == (2, 3, module.config.vocab_size)


def test_sliding_windows_are_refused() -> None:
    config = Qwen3Config(
        num_hidden_layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=0, hidden_size=8
    )
    with pytest.raises(ConfigError, match="wanted full attention in every layer"):
        check_plain_attention(config)


def count_calls(part: torch.nn.Module) -> list[None]:
    calls: list[None] = []
    part.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls
