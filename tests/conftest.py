"""The real embedded model, loaded once a session: in float32, where batched must equal one at a time."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as prefs.run does, before torch is loaded
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, and so do the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import yaml
from hypothesis import settings
from omegaconf import OmegaConf

from prefs.config import CONF
from prefs.data.template import Template
from prefs.models.embedded import smollm2_folder

# What loads torch is imported where it is used: the process that hands out the tests to the workers runs none.
if TYPE_CHECKING:
    from prefs.models.loading import Models, ModelSpec
    from prefs.models.local.engine import LocalEngine
    from prefs.models.tokens import ChatEncoder

# How long an example takes is the machine's affair.
settings.register_profile("prefs", deadline=None)
settings.load_profile("prefs")

TEMPLATES = ("binary", "likert", "agreement", "stated", "anchored", "anchored_precise")
# Files are handed to the workers in this order, so that none is left with a long one at the end.
LONGEST_FIRST = (
    *(
        "test_families",
        "test_run",
        "test_hosts",
        "test_concept_job",
        "test_transformer_lens",
        "test_thinking",
        "test_rate",
        "test_hub",
    ),
    *("test_comparison", "test_descent", "test_ridge", "test_plan", "test_keys", "test_choose"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def template(name: str) -> Template:
    """A template as the shipped YAML gives it."""

    text = (CONF / "template" / f"{name}.yaml").read_text()
    made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Template), yaml.safe_load(text)[name]))
    assert isinstance(made, Template)
    return made


@pytest.fixture(scope="session")
def smollm2_fp32() -> ModelSpec:
    from prefs.models.loading import ModelSpec

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
    import torch

    from prefs.models.device import resolve_dtype

    return dataclasses.replace(smollm2_fp32, dtype=resolve_dtype("auto", torch.device("cpu")))


@pytest.fixture(scope="session")
def models() -> Models:
    from prefs.models.loading import Models

    return Models()


@pytest.fixture(scope="session")
def backend(models: Models, smollm2_fp32: ModelSpec) -> LocalEngine:
    from prefs.models.local.engine import LocalEngine

    loaded = models.get(smollm2_fp32)
    assert isinstance(loaded, LocalEngine)
    return loaded


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder())


@pytest.fixture(scope="session")
def encoder(tokenizer) -> ChatEncoder:
    from prefs.models.tokens import ChatEncoder

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


@pytest.fixture(scope="session")
def serial(tmp_path_factory) -> Path:
    """The same sweep by Hydra's own launcher: one job after another, in one process."""
    from sweeps import environment, sweep

    folder = tmp_path_factory.mktemp("serial")
    sweep(folder, environment(folder / "store"), "wandb.mode=disabled")
    return folder
