"""The real embedded model, loaded once a session: in float32, where batched must equal one at a time."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as prefs.run does, before torch is loaded

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from prefs.chat import ChatEncoder
from prefs.config import TemplateConfig
from prefs.models.device import resolve_dtype
from prefs.models.embedded import smollm2_folder
from prefs.models.loading import Models, ModelSpec
from prefs.models.transformer_lens import TransformerLensBackend
from prefs.templates import Template

TEMPLATES = ("binary", "likert", "agreement", "stated", "anchored", "anchored_precise")


def template(name: str) -> Template:
    """A template as the shipped YAML gives it."""
    from importlib.resources import files

    text = (files("prefs.conf") / "template" / f"{name}.yaml").read_text()
    config = OmegaConf.merge(OmegaConf.structured(TemplateConfig), yaml.safe_load(text)[name])
    return Template.from_config(OmegaConf.to_object(config))


@pytest.fixture(scope="session")
def smollm2_fp32() -> ModelSpec:
    return ModelSpec(
        name="smollm2",
        path="embedded:smollm2",
        dtype="float32",
        device="cpu",
        batch_tokens=2048,
        prefill="Answer: ",
    )


@pytest.fixture(scope="session")
def smollm2(smollm2_fp32: ModelSpec) -> ModelSpec:
    """In the precision that users get on this machine: bfloat16 where it is fast."""
    return dataclasses.replace(smollm2_fp32, dtype=resolve_dtype("auto", torch.device("cpu")))


@pytest.fixture(scope="session")
def models() -> Models:
    return Models()


@pytest.fixture(scope="session")
def backend(models: Models, smollm2_fp32: ModelSpec) -> TransformerLensBackend:
    loaded = models.get(smollm2_fp32)
    assert isinstance(loaded, TransformerLensBackend)
    return loaded


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder())


@pytest.fixture(scope="session")
def encoder(tokenizer) -> ChatEncoder:
    return ChatEncoder(tokenizer)


@pytest.fixture
def prefs_log(caplog) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="prefs")
    return caplog


@pytest.fixture
def datasets_cache(tmp_path_factory, monkeypatch) -> Path:
    """An empty cache for the library `datasets`, which reads its environment only once."""
    import datasets

    folder = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder
