"""Composed configs: what ships, and what is wrong: one line that names the key, before anything is loaded."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra_app import shipped_configs
from omegaconf.errors import OmegaConfBaseException

from prefs.config import CONF, Config, typed
from prefs.config.keys import check_hydra_keys
from prefs.errors import UserError, explain
from prefs.models.loading import ModelSpec
from prefs.results.stability import stability, stability_table
from prefs.statistics.groups import groups_by_origin
from prefs.statistics.measured import Measured


@pytest.fixture(autouse=True)
def hydra_app():
    with shipped_configs():
        yield


def composed(*overrides: str) -> Config:
    return typed(compose("config", overrides=list(overrides)))


def shipped(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


# What a model that somebody else serves cannot give.
SERVED = ["rating.exact=false", "capture=none", "probe=none"]
OPTIONS = "template.anchored_precise.options"
WILDCHAT = "dataset.sources.wildchat"
CONCEPT = ["concept=[liking_math]"]
LIKING = "concept.liking_math"
API = ["model=hf", "model.path=tiny", "model.backend=openai"]
STEERING = [*CONCEPT, "steering=concept"]


def test_roles_templates_and_what_is_not_given():
    config = composed()
    assert (config.model.name, list(config.template), config.completer.model) == ("smollm2", ["anchored_precise"], None)
    assert composed("completer=smollm2").completer.model.path == "embedded:smollm2"
    assert composed("dataset=file", f"dataset.path={__file__}").dataset.name == "test_config.py"
    empty = composed("rating.system_prompt=", "completer.system_prompt=''")
    assert (empty.rating.system_prompt, empty.completer.system_prompt) == ("", "")
    assert config.rating.system_prompt is None


@pytest.mark.parametrize("name", shipped("dataset"))
def test_the_reports_data_sets_are_pinned_and_capped(name):
    dataset = composed(f"dataset={name}", *[f"dataset.path={__file__}"] * (name == "file")).dataset
    origins = {"mixed": ["BAILBENCH", "WILDCHAT", "ALPACA", "MATH"], "file": [], "mini": []}.get(name, [name.upper()])
    assert [source.origin for source in dataset.sources.values()] == origins
    assert dataset.limit == (1000 if origins else None)
    for source in dataset.sources.values():
        assert re.search(r"\b[0-9a-f]{40}\b", source.revision or source.path)


@pytest.mark.parametrize("name", shipped("model"))
def test_every_model_rates_completes_and_judges(name, monkeypatch):
    for key in ("OPENAI_API_KEY", "OPENROUTER_API_KEY"):
        monkeypatch.setenv(key, "none")
    path = {"hf": "path=a/b"}.get(name)
    config = composed(
        f"model={name}", *[f"model.{path}"] * (path is not None), *SERVED * (name in ("haiku", "gpt5nano"))
    )
    assert config.model.name == ("b" if name == "hf" else name)
    spec = ModelSpec.from_config(config.model)
    if spec.backend == "openai":
        assert spec.api.price_prompt
    elif "/" in spec.path:
        assert name == "hf" or re.fullmatch("[0-9a-f]{40}", spec.revision or "")
    composed("completer=hf", f"model@completer.model={name}", *[f"completer.model.{path}"] * (path is not None))
    composed("judge=llm", f"model@judge.model={name}", *[f"judge.model.{path}"] * (path is not None))


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in ("judge", "probe", "concept") for name in shipped(group)]
)
def test_every_option_of_the_other_groups(group, name):
    if group == "concept":
        assert composed(f"concept=[{name}]").concept[name].contrast == ["positive", "negative"]
        return
    config = getattr(composed(f"{group}={name}"), group)
    assert config.name == name
    if group == "probe":
        assert (config.kind, config.binary) == (name, name == "logistic")


@pytest.mark.parametrize("name", shipped("experiment"))
def test_every_experiment_gives_configs_that_exist(name):
    hydra = compose("config", overrides=[f"+experiment={name}"], return_hydra_config=True).hydra
    parameters = {key: values.split(",") for key, values in (hydra.sweeper.params or {}).items()}
    assert hydra.mode is RunMode.MULTIRUN or not parameters
    for values in itertools.product(*parameters.values()):
        composed(f"+experiment={name}", *map("=".join, zip(parameters, values, strict=True)))
    assert composed(f"+experiment={name}", "model=llama8b", "dataset=mixed").model.name == "llama8b"


def test_the_wandb_sweep_gives_configs_that_exist():
    sweep = yaml.safe_load((Path(__file__).parents[1] / "docs" / "wandb_sweep.yaml").read_text())
    fixed = [part for part in sweep["command"] if "=" in part]
    keys = list(sweep["parameters"])
    for values in itertools.product(*(parameter["values"] for parameter in sweep["parameters"].values())):
        composed(*fixed, *(f"{key}={value}" for key, value in zip(keys, values, strict=True)))
    kind, metric, origin = sweep["metric"]["name"].split("/")
    assert (kind, origin) == ("stability", "ALL")
    groups = groups_by_origin([], resamples=0, seed=0)
    nothing = Measured((), (), ("1", "2"), (1.0, 2.0), np.empty((0, 2)), None, np.empty(0))
    assert metric in stability_table(stability(nothing, groups, 0.9)).columns


def test_conditions_are_the_first_concept_s_system_prompts():
    roles = ["completer.condition=positive", "rating.condition=neutral"]
    config = composed("concept=[liking_math,liking_poetry]", *roles)
    assert config.completer.system_prompt == config.concept["liking_math"].conditions["positive"]
    assert config.rating.system_prompt is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=gemma"], "model: got 'gemma'; allowed: one of gemma27b, gemma3_27b, gpt5nano"),
        (["modle=3"], "modle: there is no such key; did you mean 'model'? Known here: capture, choice, completer"),
        (["model.prefil=x"], "model.prefil: there is no such key; did you mean 'prefill'? Known here: api"),
        (["rating.seed=1"], "rating.seed: there is no such key; did you mean 'seeds'?"),
        (["model.dtype=int8"], "model.dtype: Invalid value 'int8', expected one of [auto, bfloat16, float16, float32]"),
        (["model=hf"], "model.path: got '???'; allowed: a value"),
        (["model.device=gpu"], "model.device: got 'gpu'; allowed: auto, cpu, mps, cuda or cuda:N"),
        (["model.device_map=all"], "model.device_map: got 'all'; allowed: one of auto, balanced, balanced_low_0"),
        (["model.device_map=auto", "model.device=cpu"], "model.device: got 'cpu'; allowed: auto, since device_map"),
        (["model.attn_implementation=flash"], "model.attn_implementation: got 'flash'; allowed: one of auto, eager"),
        (["model.backend=vlm"], "model.backend: got 'vlm'; allowed: one of transformer_lens"),
        (["rating.seeds=[0,0]"], "rating.seeds: got [0, 0]; allowed: seeds that differ"),
        (["rating.seeds=[]", "rating.exact=false", "probe=none"], "rating.seeds: got []; allowed: at least one seed"),
        (["rating.temperature=-1"], "rating.temperature: got -1.0; allowed: 0"),
        (["completer.top_p=0"], "completer.top_p: got 0.0; allowed: more than 0, at most 1"),
        (["capture.layers=some"], "capture.layers: got 'some'; allowed: all, or a list of layer numbers"),
        (["capture.positions=[last]"], "capture.positions: got 'last'; allowed: one of last_prompt, first_completion"),
        (["capture=none"], "probe.kind: got 'ridge'; allowed: none, since nothing is captured; or capture=residual"),
        (["model.backend=vllm"], "model.backend=vllm, which gives no residual vectors; add: capture=none probe=none"),
        (["probe.positions=[first_completion]"], "probe.positions: got 'first_completion'; allowed: a captured"),
        (["probe.targets=[good]"], "probe.targets: got 'good'; allowed: one of exact, sampled, single"),
        (["probe=logistic", "probe.targets=[refused]", "judge=none"], "probe.targets: got ['refused']; allowed: good"),
        (["probe=logistic", "probe.threshold=middle"], "probe.threshold: got 'middle'; allowed: midpoint, median or a"),
        (["probe.penalties=[1,-1]"], "probe.penalties: got [-1.0]; allowed: at least one number, each more than 0"),
        (["probe=linear", "probe.optimizer=adam"], "probe.optimizer: got 'adam'; allowed: one of adamw, sgd"),
        (["probe.controls.permutations=-1"], "probe.controls.permutations: got -1; allowed: 0 to 100000"),
        (["model=haiku"], "rating.exact: got True; allowed: false, since this model's server gives no"),
        (["dataset=file", "dataset.path=/no/file.csv"], "got '/no/file.csv'; allowed: a file that exists"),
        (["dataset.seed=-1"], "dataset.seed: got -1; allowed: seeds that are 0 or more"),
        (["dataset.kind=hub"], "dataset.sources: got {}; allowed: at least one source"),
        (["dataset=mixed", f"{WILDCHAT}.path=/no/folder"], f"{WILDCHAT}.path: got '/no/folder'; allowed: a folder or"),
        (["dataset=wildchat", f"{WILDCHAT}.reader=chat"], "expected one of [columns, conversation]"),
        (["dataset=wildchat", f"{WILDCHAT}.prompt=[a,b]"], "got ['a', 'b']; allowed: the one column that holds"),
        (["wandb.mode=on"], "wandb.mode: got"),
        (["stats.target_r=1"], "stats.target_r: got 1.0"),
        (["template.anchored_precise.question=''"], "template.anchored_precise.question: got ''; allowed: some text"),
        ([f"{OPTIONS}=[{{say: '1', value: 2}},{{say: '2', value: 1}}]"], "got '1: 2.0'; allowed: numbers"),
        ([f"{OPTIONS}=[{{say: a, value: 1}},{{say: A, value: 2}}]"], "options that differ in more than case"),
        (["completer.condition=positive"], "completer.condition: got 'positive'; allowed: null, since no concept"),
        ([*CONCEPT, "rating.condition=good"], "rating.condition: got 'good'; allowed: one of positive, neutral, negat"),
        ([*CONCEPT, "rating.condition=neutral", "rating.system_prompt=Hi"], "rating.system_prompt: got 'Hi'; allowed"),
        (["concept=[liking_maths]"], "concept: got 'liking_maths'; allowed: liking_math, liking_poetry, or a file of"),
        ([*CONCEPT, f"{LIKING}.contrast=[positive,bad]"], "contrast: got 'bad'; allowed: one of positive, neutral"),
        ([*CONCEPT, f"{LIKING}.conditions.positive=null", f"{LIKING}.conditions.negative=null"], "different system pr"),
        ([*CONCEPT, f"{LIKING}.conditions.positive=' '"], "conditions.positive: got ' '; allowed: some text, or null"),
        ([*CONCEPT, f"+{LIKING}.wordings.third.positive=Hi"], "wordings.third: got ['positive']; allowed: a system"),
        (["concept=[liking_math,liking_poetry]", f"{LIKING}.name=liking_poetry"], "concepts with different names"),
        (["steering=concept"], "steering.vector: got 'concept'; allowed: a folder of saved vectors, since no concept"),
        ([*STEERING, "steering.position=first_completion"], "steering.position: got 'first_completion'; allowed: a ca"),
        ([*STEERING, "steering.coefficients=[1,1]"], "steering.coefficients: got [1.0, 1.0]; allowed: two or more"),
        ([*STEERING, "steering.unit=sd"], "steering.unit: got 'sd'; allowed: one of vector, norm"),
        ([*STEERING, "steering.at=answer"], "steering.at: got 'answer'; allowed: one of all, last, completion, quest"),
        ([*STEERING, "rating.exact=false", "probe=none"], "rating.exact: got False; allowed: true, since steered"),
        ([*STEERING, "steering.coherence.perplexity=nan"], "steering.coherence.perplexity: got nan; allowed: 0 or"),
        (["probe.kind=linear"], "probe.kind: got 'linear'; allowed: none, or what probe._target_ is (RidgeBank)"),
        (["judge=llm", "judge.compliance=Refusal"], "judge.refusal: got ('refusal', 'Refusal'); allowed: a word for"),
        (["judge=llm", "judge.question=Hi"], "judge.question: got 'Hi'; allowed: a question that holds {request}"),
        (["template=[anchored,likert]", "template.likert.name=anchored_1_5"], "templates with different names"),
        (["shard=3/2"], "shard: got '3/2'; allowed: null, or i/n"),
        (["plan_tflops=0"], "plan_tflops: got 0.0; allowed: more than 0, in 10^12 operations a second"),
        (["store.lease_s=inf"], "store.lease_s: got inf; allowed: seconds, 0 or more"),
        (["model.thinking={enabled: true, close: ' '}"], "thinking.close: got ' '; allowed: the text that ends"),
        ([*API, "model.api.base_url=api.openai.com"], "model.api.base_url: got 'api.openai.com'; allowed: the address"),
        ([*API, "model.api.base_url=https://me:secret@host/v1"], "model.api.base_url: got 'one with a password'"),
        ([*API, "model.api.top_logprobs=50"], "model.api.top_logprobs: got 50; allowed: 0 to 20"),
        ([*API, "model.thinking={enabled: true, force_close: true}"], "thinking.force_close: got True; allowed: false"),
        ([*API, "model.prefill=Answer"], "model.prefill: got 'Answer'; allowed: '' unless the server can go on"),
        (["template=[a"], "no viable alternative at input '[a'"),
        (["+model.nosuch=1"], "model.nosuch: there is no such key. Known here: api, attn_implementation"),
        (["+rating.sedes=[0]"], "rating.sedes: there is no such key; did you mean 'seeds'? Known here: condition"),
        (["+model.seeds=[0]"], "model.seeds: there is no such key; did you mean 'steering.seeds' or 'choice.seeds'"),
        ([f"+{OPTIONS}.0.worth=3"], "options.0.worth: there is no such key. Known here: also, say, value"),
        ([*CONCEPT, f"++{LIKING}.fold=3"], f"{LIKING}.fold: there is no such key; did you mean 'folds'?"),
        (["model.vllm.engine.seed=1"], "there is no such key yet; to add it, write +model.vllm.engine.seed=..."),
        (["+probe.trainer.precision=bf16-mixed"], "probe.trainer: got 'precision'; allowed: one of accelerator, dev"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(overrides, expected):
    with pytest.raises((UserError, HydraException, OmegaConfBaseException)) as caught:
        composed(*overrides)
    line = explain(caught.value)
    assert expected in line
    assert "\n" not in line
    assert "secret" not in line


@pytest.fixture
def own_folder(tmp_path):
    """Compose from a folder of a user's own YAML files beside the shipped ones."""
    GlobalHydra.instance().clear()
    (tmp_path / "main.yaml").write_text(f"defaults:\n  - config\n  - _self_\nhydra:\n  searchpath: [file://{CONF}]\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        yield tmp_path


@pytest.mark.parametrize(
    ("group", "text", "expected"),
    [
        ("model", "name: mine\npath: a/b\nnosuch: 1\n", "model.nosuch: there is no such key"),
        (
            "completer",
            "defaults: [self, _self_]\nsead: 1\n",
            "completer.sead: there is no such key; did you mean 'seed'",
        ),
        ("probe", "defaults: [ridge, _self_]\ntrainer: {fast_dev_run: true}\n", "probe.trainer: got 'fast_dev_run'"),
        ("template", "mine: {name: mine, scal: 3}\n", "template.mine.scal: there is no such key"),
        ("experiment", "# @package _global_\nrating: {sedes: [0]}\n", "rating.sedes: there is no such key; did you me"),
    ],
)
def test_a_key_that_nothing_reads_in_a_users_own_file(own_folder, group, text, expected):
    (own_folder / group).mkdir()
    (own_folder / group / "mine.yaml").write_text(text)
    with pytest.raises((UserError, HydraException, OmegaConfBaseException)) as caught:
        typed(compose("main", overrides=[f"{'+' * (group == 'experiment')}{group}=mine"]))
    assert expected in explain(caught.value)


def test_keys_that_hydra_does_not_read():
    def check(*overrides: str) -> None:
        check_hydra_keys(compose("config", overrides=list(overrides), return_hydra_config=True).hydra)

    check("+hydra.job.env_set.HF_HUB_OFFLINE=1", "hydra.verbose=true", "+experiment=model_comparison")
    for override in ("+hydra.nosuch=1", "+hydra.job.nosuch.inner=1"):
        with pytest.raises(UserError, match=r"^hydra\.(job\.)?nosuch: there is no such key\. Known here: "):
            check(override)


def test_a_completion_is_as_long_as_its_model_may_write():
    for model, tokens in (("llama8b", 512), ("smollm2_plain", 64)):
        for chosen in ([f"model={model}"], ["completer=hf", f"model@completer.model={model}"]):
            assert composed(*chosen).completer.max_new_tokens == tokens
    for completer, tokens in (("llama8b", 512), ("smollm2", 64)):
        assert composed("model=llama8b", f"completer={completer}").completer.max_new_tokens == tokens
    assert composed("completer=llama8b", "completer.max_new_tokens=7").completer.max_new_tokens == 7


def test_a_users_own_template_and_concept(own_folder):
    options = "".join(f"    - {{say: '{n}', value: {n}}}\n" for n in range(11))
    for group, text in {
        "template": f"mine:\n  name: from_0_to_10\n  question: From 0 to 10?\n  options:\n{options}",
        "concept": "mine:\n  name: mine\n  conditions: {kind: Be kind., plain: null}\n  contrast: [kind, plain]\n",
    }.items():
        (own_folder / group).mkdir()
        (own_folder / group / "mine.yaml").write_text(text)
    config = typed(compose("main", overrides=["template=mine", "concept=[mine]", "completer.condition=kind"]))
    assert config.template["mine"].values == tuple(range(11))
    assert (config.concept["mine"].origins, config.completer.system_prompt) == (None, "Be kind.")
    with pytest.raises(HydraException) as caught:
        compose("main", overrides=["template=[mime]"])
    assert "anchored, anchored_precise, binary, likert, mine, stated, or a file of your own" in explain(caught.value)
