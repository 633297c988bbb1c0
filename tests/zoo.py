"""A tiny configuration of every family that transformers and TransformerLens load: windows, states, experts, soft caps,
alibi and the rest are kept, and windows are shorter than the conversations of the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import SIZES, tiny_model
from transformers import AutoConfig, PreTrainedConfig

from prefs.models.loading import ModelSpec

# The first of the embedded tokenizer's tokens.
VOCABULARY = 1024
SMALL = SIZES | {"vocab_size": VOCABULARY}
WINDOW = {"sliding_window": 24}
EXPERTS = {
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4},
    **{"num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_intermediate_size": 32},
    **{"shared_expert_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    **{"first_k_dense_replace": 1, "moe_num_shared_experts": 1, "num_shared_experts": 1},
}
MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
MAMBA2 = {
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16},
    **{"mamba_d_conv": 4, "mamba_expand": 2, "mamba_d_ssm": 128},
}
DELTA = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention", "full_attention"]},
}
GPT = {"n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": 2048, "n_inner": 128, "rotary_dim": 8}
GEMMA = {"query_pre_attn_scalar": 16, **WINDOW}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0}
SLIDING_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]

# What a family's configuration needs beside `SIZES`.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {**EXPERTS, **WINDOW, "num_dense_layers": 1, "global_attn_every_n_layers": 2},
    "apertus": {},
    "arcee": {},
    "bamba": {**MAMBA2, "attn_layer_indices": [2]},
    "bitnet": {},
    "bloom": {"n_layer": 5, "n_head": 4},
    "codegen": GPT,
    "cohere": {},
    "cohere2": {**WINDOW, "layer_types": SLIDING_TYPES},
    "deepseek_v2": {**EXPERTS, **MLA, "num_key_value_heads": 4, "head_dim": 8},
    "deepseek_v3": {**EXPERTS, **MLA, "num_key_value_heads": 4, "head_dim": 8},
    "ernie4_5": {},
    "ernie4_5_moe": {**EXPERTS, "moe_layer_start_index": 1},
    "exaone4": {**WINDOW, "layer_types": SLIDING_TYPES},
    "falcon": {"head_dim": None, "alibi": True, "new_decoder_architecture": False, "multi_query": True},
    "falcon_h1": MAMBA2,
    "falcon_mamba": {"state_size": 8},
    "flex_olmo": EXPERTS,
    "gemma": {},
    "gemma2": GEMMA,
    "gemma3": {
        "text_config": {**SMALL, **GEMMA, "layer_types": SLIDING_TYPES},
        "vision_config": {**VISION, "image_size": 28},
    },
    "gemma3_text": {**GEMMA, "layer_types": SLIDING_TYPES},
    "gemma4_text": {
        **WINDOW,
        "layer_types": SLIDING_TYPES,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 2,
        "global_head_dim": 16,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": EXPERTS,
    "glm4_moe_lite": {**EXPERTS, **MLA, "num_key_value_heads": 4},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "num_layers": 5,
        "num_heads": 4,
        "window_size": 24,
        "attention_types": [[["global", "local"], 2], [["global"], 1]],
    },
    "gpt_neox": {},
    "gpt_oss": {**EXPERTS, **WINDOW, "layer_types": SLIDING_TYPES},
    "gptj": GPT,
    "granite": {},
    "granitemoe": EXPERTS,
    "granitemoehybrid": {
        **EXPERTS,
        **MAMBA2,
        "layer_types": ["mamba", "mamba", "attention", "mamba", "attention"],
        "shared_intermediate_size": 32,
        "position_embedding_type": "rope",
    },
    "hunyuan_v1_dense": {},
    "jais2": {},
    "jamba": {
        **EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "jetmoe": {**EXPERTS, "kv_channels": 16, "num_key_value_heads": 2},
    "lfm2": {
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {
        **EXPERTS,
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
        "num_dense_layers": 1,
    },
    "llama": {},
    "llama4_text": {
        **EXPERTS,
        "attention_chunk_size": 24,
        "intermediate_size_mlp": 64,
        "no_rope_layers": [1, 1, 0, 1, 0],
    },
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "minimax_m2": EXPERTS,
    "ministral3": {},
    "mistral": WINDOW,
    "mixtral": {**EXPERTS, **WINDOW},
    "modernbert-decoder": {"local_attention": 24, "global_attn_every_n_layers": 2},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 5, "max_seq_len": 2048},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        **EXPERTS,
        "layers_block_type": ["mamba", "attention", "mamba", "mlp", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "moe_latent_size": None,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": {**WINDOW, "layer_types": SLIDING_TYPES},
    "olmo_hybrid": DELTA,
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi": {},
    "phi3": WINDOW,
    "phi3_longrope": {
        "original_max_position_embeddings": 64,
        "rope_parameters": {**LONG, "original_max_position_embeddings": 64},
    },
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen3": {},
    "qwen3_5_moe_text": {**EXPERTS, **DELTA},
    "qwen3_5_text": DELTA,
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, **DELTA},
    "recurrent_gemma": {
        "lru_width": 64,
        "attention_window_size": 24,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv": {"attention_hidden_size": 64, "context_length": 2048},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": WINDOW,
    "vaultgemma": {**GEMMA, "layer_types": SLIDING_TYPES},
    "xglm": {"d_model": 64, "ffn_dim": 128, "num_layers": 5, "attention_heads": 4},
    "youtu": {**MLA, "num_key_value_heads": 4, "head_dim": 8},
    "zamba2": {
        **MAMBA2,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "hybrid_layer_ids": [1, 3],
    },
    "gemma4": {"text_config": {**SMALL, **WINDOW, "layer_types": SLIDING_TYPES}},
    "gemma4_unified": {"text_config": {**SMALL, **WINDOW, "layer_types": SLIDING_TYPES}},
    "glm_moe_dsa": {
        **EXPERTS,
        **MLA,
        "num_key_value_heads": 4,
        "index_topk": 512,
        "index_head_dim": 16,
        "index_n_heads": 2,
    },
    "laguna": {**EXPERTS, **WINDOW, "layer_types": SLIDING_TYPES},
}


def family(name: str) -> PreTrainedConfig:
    """The tiny configuration of a family, in its own names."""
    own = FAMILIES[name]
    if "text_config" in own:
        return AutoConfig.for_model(name, **own)
    sizes = {key: value for key, value in {**SMALL, **own}.items() if value is not None}
    return AutoConfig.for_model(name.removesuffix("_longrope"), **sizes)


def zoo_model(folder: Path, name: str) -> ModelSpec:
    """A model folder of a family, with few tokens; in float32 on the CPU."""
    spec = tiny_model(folder, family(name))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = tokenizer["model"]
    merged = len(model["vocab"]) - len(model["merges"])  # tokens before those that merges make, in their order
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < VOCABULARY}
    model["merges"] = model["merges"][: VOCABULARY - merged]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return spec
