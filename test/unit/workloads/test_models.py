"""Random models: of the shape that was asked for, decode modules of their base, and made once."""

from __future__ import annotations

from pathlib import Path

import torch

from sglang_prefillshare.identity.adapter import read_adapter
from sglang_prefillshare.identity.fingerprint import identify_base
from sglang_prefillshare.identity.manifest import check_manifest, read_manifest
from sglang_prefillshare.workloads.config import RandomModel
from sglang_prefillshare.workloads.models import make_random_models, parameter_count, token_id_range


def test_modules_fit_their_base_and_have_weights_of_their_own(tmp_path: Path):
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    shape = RandomModel(
        folder=str(tmp_path), hidden_size=32, intermediate_size=48, layers=2, heads=4, kv_heads=2, vocab_size=320
    )
    folders = make_random_models(shape, ("planner", "coder"))
    made = folders.of("shared")
    assert set(made) == {"base", "planner", "coder"} and not folders.adapters
    weights = {name: load_file(folder / "model.safetensors") for name, folder in made.items()}
    for name in ("planner", "coder"):
        manifest = read_manifest(made[name])
        assert manifest is not None
        check_manifest(manifest, identify_base(made["base"], cache_dir=tmp_path), module=name)
        key = "model.layers.0.self_attn.k_proj.weight"
        assert weights[name][key].shape == weights["base"][key].shape
        assert not torch.equal(weights[name][key], weights["base"][key])
    assert sum(tensor.numel() for tensor in weights["base"].values()) == parameter_count(shape)
    tokenizer = AutoTokenizer.from_pretrained(made["base"])
    assert len(tokenizer) == 320 and tokenizer.decode(tokenizer.encode("Héllo, 1\n")) == "Héllo, 1\n"
    low, high = token_id_range(made["base"])
    assert 0 < low < high <= 320

    before = {name: (folder / "model.safetensors").stat().st_mtime_ns for name, folder in made.items()}
    assert make_random_models(shape, ("planner", "coder")) == folders
    assert before == {name: (folder / "model.safetensors").stat().st_mtime_ns for name, folder in made.items()}


def test_adapters_fit_their_base_and_change_its_answers(tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shape = RandomModel(
        folder=str(tmp_path), hidden_size=32, intermediate_size=48, layers=2, heads=4, kv_heads=2, vocab_size=320
    )
    made = make_random_models(shape, ("planner", "coder"), has_modules=False, has_adapters=True).of("unified")
    assert set(made) == {"base", "planner", "coder"}
    logits = []
    for name in ("planner", "coder"):
        assert read_adapter(name, made[name]).rank == shape.lora_rank
        manifest = read_manifest(made[name])
        assert manifest is not None
        check_manifest(manifest, identify_base(made["base"], cache_dir=tmp_path), module=name)
        base = AutoModelForCausalLM.from_pretrained(made["base"])
        with torch.inference_mode():
            logits.append(base(torch.tensor([[5, 6, 7]])).logits)
            logits.append(PeftModel.from_pretrained(base, made[name])(torch.tensor([[5, 6, 7]])).logits)
    assert torch.equal(logits[0], logits[2])
    assert not any(torch.allclose(logits[0], other) for other in (logits[1], logits[3]))
    assert not torch.allclose(logits[1], logits[3])
