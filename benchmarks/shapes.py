"""What the benchmarks run: the embedded model, or random weights in the shape of a larger one.

The seed is fixed, so that two models of one shape, device and precision have the same weights. All have the embedded
model's tokenizer.
"""

from __future__ import annotations

import tempfile

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig

from prefs.models.embedded import smollm2_folder
from prefs.models.loading import ModelSpec
from prefs.models.local.bridge import wrap
from prefs.models.local.engine import LocalEngine

SHAPES = {
    "llama_1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    ),
    "llama_8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    ),
    "llama_tiny": LlamaConfig(
        vocab_size=49152, hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=8192,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    ),
    "gemma2_27b": Gemma2Config(
        hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, num_attention_heads=32,
        num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144,
    ),
    "gemma2_tiny": Gemma2Config(
        vocab_size=49152, hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=256,
    ),
}  # fmt: skip
CHOICES = ("smollm2", *SHAPES)


def plain_model(spec: ModelSpec, attention: str | None = None):
    """The model of a spec (its name is the shape) as transformers makes it, on its device.

    ``attention`` is transformers' own choice if it is None.
    """
    device, dtype = torch.device(spec.device), getattr(torch, spec.dtype)
    if spec.name == "smollm2":
        model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=dtype, attn_implementation=attention)
        return model.to(device).eval()
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(SHAPES[spec.name], dtype=dtype, attn_implementation=attention)
    return model.eval()


def prefs_model(spec: ModelSpec, model=None) -> LocalEngine:
    """The same in `prefs`; around a given `plain_model`, or one of its own."""
    model = plain_model(spec, "eager") if model is None else model
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return LocalEngine(wrap(model, tokenizer, spec, folder), tokenizer, spec)


def lens_model(spec: ModelSpec) -> TransformerBridge:
    """The same in TransformerLens, as its users load it."""
    model = plain_model(spec, "eager")
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return TransformerBridge.boot_transformers(
            folder,
            hf_model=model,
            tokenizer=AutoTokenizer.from_pretrained(smollm2_folder()),
            device=spec.device,
            dtype=getattr(torch, spec.dtype),
        )
