"""Tiny models of random weights, in folders that load as any model does, with the embedded model's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3Config, LlamaConfig, PreTrainedConfig

from prefs.models.embedded import smollm2_folder
from prefs.models.loading import ModelSpec

SIZES = {
    **{"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.15},
}


def llama() -> PreTrainedConfig:
    return LlamaConfig(**SIZES)


def gemma2(sliding_window: int = 24) -> PreTrainedConfig:
    """With its soft caps, and a window shorter than the conversations of the tests."""
    return Gemma2Config(**SIZES, sliding_window=sliding_window, query_pre_attn_scalar=16)


def gemma3() -> PreTrainedConfig:
    """With its image encoder, which no text reaches."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    return Gemma3Config(text_config={**SIZES, "sliding_window": 24}, vision_config={**vision, "image_size": 28})


def tiny_model(folder: Path, config: PreTrainedConfig) -> ModelSpec:
    """Make a model folder and return its spec, in float32 on the CPU."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (smollm2_folder() / name).is_file():
            shutil.copy(smollm2_folder() / name, folder)
    return ModelSpec(name=f"tiny-{config.model_type}", path=str(folder), dtype="float32", device="cpu")


def plain_model(spec: ModelSpec):
    """The same weights in transformers, with no hooks of ours."""
    return AutoModelForCausalLM.from_pretrained(spec.path, dtype=torch.float32, attn_implementation="eager").eval()
