"""Weights that are not those of the model that a config describes, and other files that do not load: one line each."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, gemma3, llama, plain_model, tiny_model
from transformers import AutoTokenizer, BloomConfig, GraniteMoeHybridConfig, MambaConfig, MixtralConfig, MptConfig

from prefs.errors import UserError
from prefs.models.architecture import architecture, context_length, written_context
from prefs.models.loading import Models, ModelSpec
from prefs.models.local import bridge as local_bridge
from prefs.models.local.bridge import load_bridge
from prefs.models.weights import check_file

FEW = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> ModelSpec:
    return tiny_model(tmp_path_factory.mktemp("llama"), llama())


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> ModelSpec:
    config = llama()
    config.tie_word_embeddings = True
    return tiny_model(tmp_path_factory.mktemp("tied"), config)


def changed(spec: ModelSpec, folder: Path, change) -> ModelSpec:
    """A copy of a model's folder with its weights changed."""
    shutil.copytree(spec.path, folder, dirs_exist_ok=True)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return dataclasses.replace(spec, path=str(folder))


def with_config(spec: ModelSpec, folder: Path, **values) -> ModelSpec:
    shutil.copytree(spec.path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return dataclasses.replace(spec, path=str(folder))


def named(rename):
    return lambda weights: {rename(name): tensor for name, tensor in weights.items()}


def without(*patterns: str):
    return lambda weights: {n: t for n, t in weights.items() if not any(re.search(pattern, n) for pattern in patterns)}


def more(**shapes: tuple[int, ...]):
    """With more tensors, whose names are written with _ for a dot and __ for _."""
    names = {name.replace("__", "\0").replace("_", ".").replace("\0", "_"): shape for name, shape in shapes.items()}
    return lambda weights: weights | {name: torch.ones(shape) for name, shape in names.items()}


def lora(weights):
    """As PEFT names them before they are merged."""
    inside = {re.sub(r"(q_proj|v_proj)\.weight", r"\1.base_layer.weight", name): t for name, t in weights.items()}
    pairs = {name.replace("base_layer", "lora_A.default"): t[:2] for name, t in inside.items() if "base_layer" in name}
    return {f"base_model.model.{name}": tensor for name, tensor in (inside | pairs).items()}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize(
    "rename",
    [
        "_orig_mod.{}".format,
        "base_model.model.{}".format,
        "module._orig_mod.{}".format,
        lambda name: re.sub(r"(layers\.\d+)\.", r"\1._orig_mod.", name),
        lambda name: re.sub(r"(layers\.\d+)\.", r"\1._checkpoint_wrapped_module._fsdp_wrapped_module.", name),
    ],
)
def test_names_that_a_wrapper_left_are_understood(tiny, tmp_path, family, rename):
    spec = tiny if family == "llama" else tiny_model(tmp_path / "own", MixtralConfig(**SIZES, num_local_experts=2))
    wrapped = changed(spec, tmp_path / "wrapped", named(rename))
    bridge, _ = load_bridge(wrapped, wrapped.path)
    ids = torch.arange(4, 20)[None]
    with torch.inference_mode():
        theirs = plain_model(spec)(ids).logits
        assert torch.allclose(bridge(ids, return_type="logits"), theirs, atol=1e-5)
        assert not torch.allclose(bridge(ids + 1, return_type="logits"), theirs, atol=1e-1)


LACKING = {
    "a layer's MLP": (
        without(r"layers\.3\.mlp"),
        "lack model.layers.3.mlp.down_proj.weight, .* which config.json asks",
    ),
    "one norm": (without(r"^model\.norm"), "lack model.norm.weight, which"),
    "the output layer": (without("lm_head"), "lack lm_head.weight, which"),
    "unknown prefix": (named("my.{}".format), "lack .* 44 more, which .* there are my.lm_head.weight, .* and 44 more"),
    "an unmerged adapter": (lora, r"lack .*k_proj|lack .*q_proj.weight.*lora_A.default"),
    "both with and without a wrapper": (
        lambda weights: weights | {f"_orig_mod.{name}": t + 1 for name, t in weights.items()},
        "have .* twice, once in a wrapper",
    ),
    "one layer more": (
        lambda weights: weights | {n.replace("layers.4", "layers.5"): t + 1 for n, t in weights.items()},
        "have model.layers.5.input_layernorm.weight, .* no place",
    ),
    "biases": (more(model_layers_0_self__attn_q__proj_bias=(64,)), "have model.layers.0.self_attn.q_proj.bias, for"),
    "scales": (more(model_layers_0_mlp_up__proj_weight__scale=(1,)), "have model.layers.0.mlp.up_proj.weight_scale, f"),
    "other sizes": (
        lambda weights: {n: torch.cat([t, t[:8]]) if len(t) == 49152 else t for n, t in weights.items()},
        r"lm_head.weight is \[49160, 64\] and not \[49152, 64\]; so are 1 more",
    ),
}


@pytest.mark.parametrize("why", LACKING)
def test_weights_of_another_model_are_refused_by_what_was_loaded_and_by_the_header(tiny, tmp_path, why):
    change, message = LACKING[why]
    spec = changed(tiny, tmp_path, change)
    with pytest.raises(UserError, match=f"^model.path: .*{message}") as caught:
        load_bridge(spec, spec.path)
    assert "\n" not in str(caught.value)
    if "wrapper" not in why:
        with pytest.raises(UserError) as by_header:
            check_file(spec.path, None)
        assert str(by_header.value) == str(caught.value)


def test_a_tied_embedding_is_missing_only_where_its_twin_is(tied, tmp_path):
    assert "lm_head.weight" not in load_file(f"{tied.path}/model.safetensors")
    load_bridge(tied, tied.path)
    check_file(tied.path, None)
    twin = changed(tied, tmp_path / "twin", named(lambda name: name.replace("model.embed_tokens", "lm_head")))
    load_bridge(twin, twin.path)
    neither = changed(tied, tmp_path / "neither", without("embed_tokens"))
    with pytest.raises(UserError, match=r"lack lm_head.weight, model.embed_tokens.weight, which"):
        load_bridge(neither, neither.path)


def test_what_the_model_does_not_have_at_all_is_left_out_with_a_warning(tiny, tmp_path, caplog):
    buffers = more(model_layers_0_self__attn_rotary__emb_inv__freq=(8,))
    spec = changed(tiny, tmp_path, lambda weights: buffers(weights) | {"v_head.summary.weight": torch.ones(1, 64)})
    with caplog.at_level(logging.WARNING, logger="prefs"):
        load_bridge(spec, spec.path)
    (warning,) = [record.message for record in caplog.records if record.name.startswith("prefs")]
    assert warning.endswith("left out what the model does not have: v_head.summary.weight")


def test_a_model_in_several_files_that_also_sees_is_whole(tmp_path):
    spec = tiny_model(tmp_path, gemma3())
    plain_model(spec).save_pretrained(tmp_path, max_shard_size="4MB")
    (tmp_path / "model.safetensors").unlink()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_file(spec.path, None)
    Models().get(spec)
    shutil.copy(next(tmp_path.glob("*.safetensors")), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has weights twice, model.safetensors and model.safetensors.index.json"):
        Models().get(spec)
    (tmp_path / "model.safetensors").unlink()
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"cannot load tiny-gemma3 .*model-0000"):
        Models().get(spec)


def test_an_adapter_is_never_applied_by_accident(tiny, tmp_path):
    beside = with_config(tiny, tmp_path / "beside")
    (tmp_path / "beside" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_config.json\) beside a whole model"):
        Models().check([beside])
    with pytest.raises(UserError, match=r"holds an adapter"):
        Models().get(beside)
    (tmp_path / "beside" / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config.json; it is an adapter \(adapter_config.json\) and no whole"):
        Models().check([beside])


QUANTISED = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "optimum|gptqmodel"),
    "awq": ({"quant_method": "awq", "bits": 4}, "gptqmodel|autoawq"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
    "hqq": ({"quant_method": "hqq"}, "hqq"),
    "torchao": ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
    "unknown": ({"quant_method": "mine"}, "mine"),
}


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_model_without_its_package_says_what_is_missing(tiny, tmp_path, method):
    quantization, names = QUANTISED[method]
    spec = with_config(tiny, tmp_path / "quantised", quantization_config=quantization)
    with pytest.raises(UserError, match=f"cannot load tiny-llama from .*({names})") as caught:
        load_bridge(spec, spec.path)
    assert "\n" not in str(caught.value)


def spoiled(folder: Path, name: str) -> None:
    content = {"model.safetensors": b"\0" * 64, "tokenizer.json": b'{"model": 1}', "config.json": b"{"}
    (folder / name).write_bytes(content[name])


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_file_is_one_line(tiny, tmp_path, name):
    shutil.copytree(tiny.path, tmp_path / "damaged")
    spoiled(tmp_path / "damaged", name)
    with pytest.raises(UserError, match="cannot load tiny-llama from ") as caught:
        load_bridge(dataclasses.replace(tiny, path=str(tmp_path / "damaged")), str(tmp_path / "damaged"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [{"model_type": "nobody"}, {"num_hidden_layers": "four"}, {"hidden_act": "no"}])
def test_a_config_that_cannot_be_is_one_line(tiny, tmp_path, values):
    spec = with_config(tiny, tmp_path / "odd", **values)
    with pytest.raises(UserError) as caught:
        load_bridge(spec, spec.path)
    assert "\n" not in str(caught.value)


def test_an_error_of_our_own_keeps_its_traceback(tiny, monkeypatch):
    def broken(module):
        raise ValueError("ours")

    monkeypatch.setattr(local_bridge, "_use_own_modules", broken)
    with pytest.raises(ValueError, match="ours"):
        load_bridge(tiny, tiny.path)


def test_a_tokenizer_of_more_tokens_than_the_model_has_embeddings(tiny, tmp_path):
    spec = with_config(tiny, tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(spec.path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # no text and no turn comes to it
    tokenizer.save_pretrained(spec.path)
    Models().get(spec)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    tokenizer.chat_template = (
        "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.save_pretrained(spec.path)
    with pytest.raises(UserError, match=r"writes <\|user\|>, <\|end\|>, with ids up to 49154, and .* 49,152 embed"):
        Models().get(spec)


CONTEXTS = {
    "bloom": (BloomConfig(**FEW, hidden_size=64, n_layer=2, n_head=4), None),
    "bloom, as published": (BloomConfig(**FEW, hidden_size=64, n_layer=2, n_head=4, seq_length=2048), 2048),
    "mpt": (MptConfig(**FEW, d_model=64, n_layers=2, n_heads=4, max_seq_len=1024), 1024),
    "mamba": (MambaConfig(**FEW, hidden_size=64, state_size=8, num_hidden_layers=2), None),
    "granite without positions": (
        GraniteMoeHybridConfig(
            **{**SIZES, "num_hidden_layers": 2},
            **{"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1},
            **{"mamba_d_state": 16, "mamba_chunk_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
            shared_intermediate_size=64,
        ),
        2048,
    ),
}


@pytest.mark.parametrize("family", CONTEXTS)
def test_families_without_positions_have_a_context_and_run(tmp_path, family):
    config, context = CONTEXTS[family]
    spec = tiny_model(tmp_path, config)
    shape = architecture(spec.path, None)
    assert (shape.layers, shape.d_model, shape.context) == (2, 64, context)
    bridge, tokenizer = load_bridge(spec, spec.path)
    tokenizer.model_max_length = int(1e30)
    assert context_length(written_context(config), tokenizer) == (context or 2**31)
    tokenizer.model_max_length = 512
    assert context_length(written_context(config), tokenizer) == (context or 512)
    ids = torch.arange(4, 20)[None]
    with torch.inference_mode():
        theirs = plain_model(spec)(ids).logits
        assert torch.allclose(bridge(ids, return_type="logits"), theirs, atol=1e-5)
