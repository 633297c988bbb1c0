"""What a model is in store keys, where its name can mean another one: served models, and models of the hub."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_hub
import pytest
from fault_server import Say, chat, serving
from hydra import compose
from hydra_app import shipped_configs
from omegaconf import OmegaConf
from tiny_models import llama, tiny_model

import prefs.data.hub as data_hub
from prefs.config import ApiConfig, typed
from prefs.errors import UserError
from prefs.job import JobCounts
from prefs.models.hub import hub_model
from prefs.models.loading import Models, ModelSpec, identity, served_nearby
from prefs.pipeline import RunFolder, run_job

SERVED = ModelSpec(name="mine", path="mine", backend="openai", dtype="served")
SMALL = (
    *("model=hf", "model.path=mine", "model.backend=openai", "model.api.key_env=null", "rating.exact=false"),
    *("capture=none", "probe=none", "dataset.limit=4", "rating.seeds=[0]", "template=anchored", "judge=none"),
    *("wandb.mode=disabled", "stats.bootstrap=0"),
)


def at(address: str, **changes: Any) -> ModelSpec:
    return dataclasses.replace(SERVED, api=ApiConfig(base_url=address, key_env=None), **changes)


def test_a_served_model_is_its_name_at_an_address_of_a_revision():
    known = {
        json.dumps(identity(spec))
        for spec in (
            at("http://127.0.0.1:8000/v1"),
            at("http://127.0.0.1:8001/v1"),
            at("http://127.0.0.1:8000/team-b/v1"),
            at("http://another:8000/v1"),
            at("http://127.0.0.1:8000/v1", revision="step-2000"),
            at("https://api.openai.com/v1"),
            at("https://api.openai.com/v1", revision="step-2000"),
        )
    }
    assert len(known) == 7
    assert identity(at("http://Mine:8000/v1/")) == identity(at("http://mine:8000/v1"))
    # Records of hosts that have one server stay what they were.
    assert identity(at("https://api.openai.com/v1")) == {"id": "mine", "revision": "api.openai.com", "dtype": "served"}
    assert identity(at("https://openrouter.ai/api/v1"))["revision"] == "openrouter.ai"


def test_which_servers_are_near():
    near = ("localhost", "127.0.0.1", "127.8.8.8", "[::1]", "192.168.1.7", socket.gethostname())
    assert all(served_nearby(at(f"http://{host}:8000/v1")) for host in near)
    assert not any(served_nearby(at(f"https://{host}/v1")) for host in ("api.openai.com", "8.8.8.8", "[2600::]"))
    assert not served_nearby(dataclasses.replace(at("http://localhost/v1"), backend="vllm"))


def test_a_second_server_of_one_name_is_asked_and_a_store_that_answered_for_one_is_told(tmp_path, caplog):
    def job(address: str, *overrides: str) -> list[str]:
        caplog.clear()
        given = [*SMALL, f"model.api.base_url={address}", f"store.dir={tmp_path / 'store'}", *overrides]
        with shipped_configs():
            cfg = compose("config", overrides=given)
        plain: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
        folder, models = tmp_path / f"{time.monotonic_ns()}", Models()
        folder.mkdir()
        with caplog.at_level(logging.WARNING, logger="prefs"):
            run_job(typed(cfg), RunFolder(folder), models, JobCounts(), plain_config=plain)
        models.keep_only([])
        return [record.message for record in caplog.records if "was not asked" in record.message]

    two, five = (serving(lambda asked, rating=rating: Say(chat(rating))) for rating in "25")
    with two as first, five as second:
        assert job(first.base_url) == []
        assert len(first.asked) == 8
        assert job(second.base_url) == []
        assert len(second.asked) == 8
        (line,) = job(first.base_url)
        assert line.startswith(f"{first.base_url} was not asked: all that is said to be from mine was in the store.")
        assert job(first.base_url, "model.revision=step-2000") == []
        assert len(first.asked) == 16


def test_a_model_that_the_hub_does_not_give_is_asked_for_once_in_a_sweep(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(data_hub, "reachable", lambda: asked.append(1) is not None)
    models, spec = Models(), ModelSpec(name="none", path="nobody/none", revision="v1")
    with pytest.raises(UserError, match=r"nobody/none is no folder here, the hub is out of reach, and its cache does"):
        models.check([spec])
    for backend in ("transformer_lens", "vllm"):
        with pytest.raises(UserError, match=r"does not have it at v1 \(not asked for again: an earlier job did\)"):
            models.check([dataclasses.replace(spec, backend=backend)])
    assert len(asked) == 1
    # Of a folder, which is mended at once, nothing is remembered.
    broken = dataclasses.replace(spec, path=str(tmp_path))
    for _ in range(2):
        with pytest.raises(UserError, match=r"has no config.json; it is no model of transformers$"):
            models.check([broken])


def test_a_commit_that_the_cache_has_is_taken_without_asking(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names, **revision: str(tmp_path / "x"))
    monkeypatch.setattr(data_hub, "reachable", lambda: pytest.fail("asked"))
    assert hub_model("some/model", "a" * 40).commit == "a" * 40


PROGRAM = """
import logging, sys, time
logging.basicConfig(format="%(message)s", level=logging.INFO)
from prefs.errors import UserError
from prefs.models.architecture import architecture
from prefs.models.loading import Models, ModelSpec, identity, model_folder
from prefs.models.types import Message, Request
path, wanted = sys.argv[1:]
models, spec = Models(), ModelSpec(name="tiny", path=path)
began = time.monotonic()
for _ in range(2):
    try:
        models.check([spec])
        if wanted == "load":
            models.get(spec)
        print(identity(spec)["revision"], architecture(model_folder(spec), spec.revision).layers)
    except UserError as error:
        print(error)
print(time.monotonic() - began < 20)
"""
FIRST, SECOND = "1" * 40, "2" * 40
NOWHERE = "http://127.0.0.1:9"  # refuses


def printed(home: Path, endpoint: str, path: str, wanted: str = "load") -> list[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", PROGRAM, path, wanted]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Retry" not in done.stderr
    *out, in_time = done.stdout.splitlines()
    assert in_time == "True"
    return out


@pytest.mark.slow
def test_hub_models_with_a_network_and_without(tmp_path):
    tiny_model(tmp_path / "hub" / "me" / "tiny" / FIRST, llama())
    tiny_model(tmp_path / "hub" / "me" / "adapted" / FIRST, llama())
    (tmp_path / "hub" / "me" / "adapted" / FIRST / "adapter_config.json").write_text("{}")
    home = tmp_path / "home"
    with fake_hub.serve(tmp_path / "hub") as hub:
        assert printed(home, hub.url, "me/tiny") == [f"{FIRST} 5"] * 2
        hub.asked.clear()
        refused = printed(home, hub.url, "me/adapted")
        assert all("me/adapted holds an adapter (adapter_config.json) beside a whole model" in line for line in refused)
        missing, again = printed(home, hub.url, "me/none", "look")
        assert "me/none is no folder here, and not on the hub or not for you to read" in missing
        assert again == f"{missing} (not asked for again: an earlier job did)"
        # The name comes to mean another model.
        tiny_model(tmp_path / "hub" / "me" / "tiny" / SECOND, llama())
        assert printed(home, hub.url, "me/tiny", "look") == [f"{SECOND} 5"] * 2
    assert printed(tmp_path / "nothing", NOWHERE, "me/tiny")[0].startswith("model.path: me/tiny is no folder here")
    # Of the newer one, the cache has the config and no weights.
    assert all("has no weights" in line for line in printed(home, NOWHERE, "me/tiny"))
