"""Every family that loads against plain transformers, alone and in a batch; and batches against single rows."""

from __future__ import annotations

import pytest
import torch
from batches import pool, thinking, worst_of_batches
from families import errors
from tiny_models import tiny_model
from transformers import AutoConfig
from zoo import zoo_model

from prefs.errors import UserError
from prefs.models.loading import Models
from prefs.models.local.engine import LocalEngine
from prefs.models.local.residuals import Recorder

# By default: windows, and positions that change with the longest row. All of the zoo: benchmarks/families.py.
SAMPLE = ("gemma3_text", "phi3_longrope")
# Windows of other kinds, states, positions of their own, soft caps, experts, latent attention, blocks that give tuples.
SLOW = (
    *("gemma2", "gemma4", "mistral", "olmo3", "gpt_neo", "modernbert-decoder", "llama4_text", "gpt_oss"),
    *("mamba", "jamba", "recurrent_gemma", "rwkv", "qwen3_5_text", "falcon_h1", "lfm2", "nemotron_h", "zamba2"),
    *("bloom", "mpt", "opt", "mixtral", "deepseek_v3", "glm_moe_dsa", "gpt2", "phi3", "qwen3"),
)
ROUNDING = 1e-3


@pytest.mark.parametrize("name", [*SAMPLE, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_family_equals_plain_transformers_alone_and_in_a_batch(tmp_path, name):
    """Scores, answers, vectors and likelihoods, steered or not, and after thoughts of unequal lengths."""
    off = {beside: own for beside, own in errors(zoo_model(tmp_path, name)).items() if max(own.values()) > ROUNDING}
    assert not off


@pytest.mark.parametrize("thinks", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_row_does_not_depend_on_the_batch_it_is_in(tmp_path, thinks):
    """Of a family with windows, with thoughts of unequal lengths and without."""
    engine = Models().get(zoo_model(tmp_path, "olmo3"))
    assert isinstance(engine, LocalEngine)
    worst = worst_of_batches(thinking(engine) if thinks else engine, 12, pool(10, seed=0), seed=1)
    assert worst.padding > 32
    assert worst.texts == 0
    assert max(worst.scores, worst.vectors) < ROUNDING


def test_blocks_that_transformer_lens_does_not_see_into_are_refused_in_one_line(tmp_path):
    """GPT's give a list."""
    spec = tiny_model(tmp_path, AutoConfig.for_model("openai-gpt", n_embd=64, n_head=4, n_layer=2, vocab_size=49152))
    with pytest.raises(UserError, match="TransformerLens shows no residual stream after block 0"):
        Models().get(spec)


def test_several_residual_streams_are_refused_in_one_line():
    """DeepSeek-V4's blocks hand over four."""
    ((_, keep),) = Recorder([0], [{"rating": (0, 1)}], [1], stops=False).hooks()
    with pytest.raises(UserError, match=r"4 residual streams, which .*capture=none"):
        keep(torch.zeros(1, 1, 4, 8), None)
