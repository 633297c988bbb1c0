"""Composed configs: what is wrong is one line that names the key, before anything is loaded."""

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
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prefs.config import CONF, Config, register, typed, with_prompts
from prefs.errors import UserError, explain
from prefs.models.loading import ModelSpec
from prefs.results.summary import groups_by_origin, stability, stability_table
from prefs.statistics.measured import Measured


@pytest.fixture(autouse=True)
def hydra_app():
    with shipped_configs():
        yield


def composed(*overrides: str) -> Config:
    return typed(compose("config", overrides=list(overrides)))


def message(*overrides: str) -> str:
    with pytest.raises((UserError, HydraException, OmegaConfBaseException)) as caught:
        composed(*overrides)
    line = explain(caught.value)
    assert "\n" not in line
    return line


OPTIONS = "template.anchored_precise.options"
WILDCHAT = "dataset.sources.wildchat"


def test_defaults():
    config = composed()
    assert config.model.name == "smollm2"
    assert list(config.template) == ["anchored_precise"]
    assert config.completer.model is None


@pytest.mark.parametrize(
    "name", ["binary", "likert", "agreement", "stated", "anchored", "anchored_precise", "[anchored,likert]"]
)
def test_every_template(name):
    assert list(composed(f"template={name}").template) == name.strip("[]").split(",")


def test_the_reports_names():
    names = [composed(f"template={name}").template[name].name for name in ("binary", "likert", "agreement", "stated")]
    assert names == ["qualitative_binary", "likert_qualitative", "likert_agreement", "stated_1_5"]


def test_roles_and_experiment():
    assert composed("completer=smollm2").completer.model.path == "embedded:smollm2"
    assert composed("+experiment=smoke").dataset.limit == 16
    assert composed("model=hf", "model.path=meta/Llama-3.1-8B").model.name == "Llama-3.1-8B"
    assert composed("dataset=file", f"dataset.path={__file__}").dataset.name == "test_config.py"


@pytest.mark.parametrize(
    ("name", "origins"),
    [
        ("bailbench", ["BAILBENCH"]),
        ("wildchat", ["WILDCHAT"]),
        ("alpaca", ["ALPACA"]),
        ("math", ["MATH"]),
        ("mixed", ["BAILBENCH", "WILDCHAT", "ALPACA", "MATH"]),
    ],
)
def test_the_reports_data_sets_are_pinned_and_capped(name, origins):
    dataset = composed(f"dataset={name}").dataset
    assert (dataset.name, dataset.limit) == (name, 1000)
    assert [source.origin for source in dataset.sources.values()] == origins
    for source in dataset.sources.values():
        assert re.search(r"\b[0-9a-f]{40}\b", source.revision or source.path)


def test_a_source_is_put_elsewhere_from_the_command_line(tmp_path):
    sources = composed("dataset=mixed", f"{WILDCHAT}.path={tmp_path}", f"{WILDCHAT}.max_chars=50").dataset.sources
    assert (sources["wildchat"].path, sources["wildchat"].max_chars) == (str(tmp_path), 50)
    assert sources["wildchat"].only == {"language": "English"}
    assert sources["alpaca"].path == "tatsu-lab/alpaca"


def shipped(group: str) -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in (CONF / group).iterdir())


# What a model that somebody else serves cannot give.
SERVED = ["rating.exact=false", "capture=none", "probe=none"]


@pytest.mark.parametrize("name", shipped("model"))
def test_every_model(name, monkeypatch):
    for key in ("OPENAI_API_KEY", "OPENROUTER_API_KEY"):
        monkeypatch.setenv(key, "none")
    needs = {"hf": ["model.path=a/b"], "haiku": SERVED, "gpt5nano": SERVED}.get(name, [])
    config = composed(f"model={name}", *needs)
    assert config.model.name == ("b" if name == "hf" else name)
    spec = ModelSpec.from_config(config.model)
    if spec.backend == "openai":
        assert spec.api.price_prompt
    elif "/" in spec.path:
        assert name == "hf" or re.fullmatch("[0-9a-f]{40}", spec.revision or "")
    # Each is a rater, a completer and a judge.
    needs = [each.replace("model.", "completer.model.") for each in needs if each.startswith("model.")]
    composed("completer=hf", f"model@completer.model={name}", *needs)
    needs = [each.replace("completer.", "judge.") for each in needs]
    composed("judge=llm", f"model@judge.model={name}", *needs)


@pytest.mark.parametrize("name", shipped("completer"))
def test_every_completer(name):
    config = composed(f"completer={name}", *["completer.model.path=a/b"] * (name == "hf"))
    assert config.completer.name == ("b" if name == "hf" else name)


@pytest.mark.parametrize("name", shipped("judge"))
def test_every_judge(name):
    assert composed(f"judge={name}").judge.name == {"llm": "smollm2"}.get(name, name)


def test_the_judge_of_the_report_has_nothing_of_the_embedded_models():
    judge, phrases = composed("judge=gpt5nano").judge, composed().judge
    assert judge.model == composed("model=gpt5nano", *SERVED).model
    assert judge.phrases == phrases.phrases


def test_qwen_thinks_and_is_told_not_to():
    thinks, not_ = composed("model=qwen32b").model, composed("model=qwen32b_nothink").model
    assert (thinks.path, thinks.revision) == (not_.path, not_.revision)
    assert (thinks.thinking.enabled, not_.thinking.enabled) == (True, False)
    assert [each.chat_template_kwargs for each in (thinks, not_)] == [
        {"enable_thinking": True},
        {"enable_thinking": False},
    ]


def test_the_canonical_sweep():
    for model, template in itertools.product(("gemma27b", "llama70b"), ("anchored", "likert")):
        config = composed(f"model={model}", f"template={template}")
        assert (config.model.name, list(config.template)) == (model, [template])


def test_the_reports_raters_over_one_completer():
    for model in ("gemma27b", "gemma3_27b", "llama70b", "qwen32b", "qwen32b_nothink"):
        config = composed("+experiment=model_comparison", "completer=llama8b", f"model={model}")
        assert (config.model.name, config.completer.name) == (model, "llama8b")
    composed("+experiment=model_comparison", "completer=llama8b", "model=haiku", "rating.exact=false")


def test_an_empty_system_prompt_is_not_none():
    config = composed("rating.system_prompt=", "completer.system_prompt=''")
    assert (config.rating.system_prompt, config.completer.system_prompt) == ("", "")
    assert composed().rating.system_prompt is None


@pytest.mark.parametrize(
    ("name", "templates", "jobs"),
    [
        ("template_comparison", ["binary", "likert", "agreement", "stated", "anchored", "anchored_precise"], {}),
        ("model_comparison", ["anchored", "anchored_precise"], {"model": "smollm2,smollm2_plain"}),
        ("refusals", ["anchored_precise"], {}),
        (
            "noise_sources",
            ["likert", "stated", "anchored_precise"],
            {"model": "smollm2,smollm2_plain", "completer.seed": "0,1"},
        ),
    ],
)
def test_the_reports_experiments_are_multiruns(name, templates, jobs):
    cfg = compose("config", overrides=[f"+experiment={name}"], return_hydra_config=True)
    assert list(cfg.template) == templates
    assert cfg.hydra.mode is RunMode.MULTIRUN
    assert dict(cfg.hydra.sweeper.params or {}) == jobs
    assert composed(f"+experiment={name}", "model=smollm2_plain", "template=likert").model.prefill == ""


def test_a_fixed_completer_of_any_kind():
    config = composed("completer=hf", "completer.model.path=meta/Llama-3.1-8B", "model=hf", "model.path=a/b")
    assert (config.completer.name, config.completer.model.path, config.model.path) == (
        "Llama-3.1-8B",
        "meta/Llama-3.1-8B",
        "a/b",
    )


def test_the_wandb_sweep_gives_configs_that_exist():
    sweep = yaml.safe_load((Path(__file__).parents[1] / "docs" / "wandb_sweep.yaml").read_text())
    fixed = [part for part in sweep["command"] if "=" in part]
    keys = list(sweep["parameters"])
    for values in itertools.product(*(each["values"] for each in sweep["parameters"].values())):
        composed(*fixed, *(f"{key}={value}" for key, value in zip(keys, values, strict=True)))
    kind, metric, origin = sweep["metric"]["name"].split("/")
    assert (kind, origin) == ("stability", "ALL")
    groups = groups_by_origin([], resamples=0, seed=0)
    nothing = Measured((), (), ("1", "2"), (1.0, 2.0), np.empty((0, 2)), None, np.empty(0))
    assert metric in stability_table(stability(nothing, groups, 0.9)).columns


def test_the_config_survives_yaml():
    register()
    text = OmegaConf.to_yaml(compose("config"), resolve=True)
    assert "smollm2" in text


CONCEPT = ["concept=[liking_math]"]
LIKING = "concept.liking_math"
STEERING = [*CONCEPT, "steering=concept"]


def test_conditions_are_the_first_concept_s_system_prompts():
    roles = ["completer.condition=positive", "rating.condition=neutral"]
    config = composed("concept=[liking_math,liking_poetry]", *roles)
    assert config.completer.system_prompt == config.concept["liking_math"].conditions["positive"]
    assert config.rating.system_prompt is None
    plain = OmegaConf.to_container(compose("config", overrides=[*CONCEPT, *roles]), resolve=True)
    filled = with_prompts(plain)
    assert filled["completer"]["system_prompt"] == config.completer.system_prompt
    assert filled["rating"]["system_prompt"] is None
    assert plain["completer"]["system_prompt"] is None


@pytest.mark.parametrize("name", shipped("concept"))
def test_every_concept(name):
    assert composed(f"concept=[{name}]").concept[name].contrast == ["positive", "negative"]


@pytest.mark.parametrize("name", ["concept_vectors", "steering"])
def test_the_reports_concepts_with_its_own_model(name):
    config = composed(f"+experiment={name}", "model=llama8b", "dataset=mixed")
    assert config.model.name == "llama8b"
    assert next(iter(config.concept)) == "liking_math"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=gemma"], "model: got 'gemma'; allowed: one of gemma27b, gemma3_27b, gpt5nano"),
        (["template=likrt"], "template: got 'likrt'; allowed: one of agreement, anchored"),
        (["zzz=3"], "zzz: there is no such key. Known here: capture, completer"),
        (["modle=3"], "modle: there is no such key; did you mean 'model'? Known here: capture, completer"),
        (["model.prefil=x"], "model.prefil: there is no such key; did you mean 'prefill'? Known here: api"),
        (["rating.seed=1"], "rating.seed: there is no such key; did you mean 'seeds'?"),
        (["model.batch_tokens=many"], "model.batch_tokens: Value 'many' of type 'str' could not be"),
        (["model.dtype=int8"], "model.dtype: Invalid value 'int8', expected one of [auto, bfloat16, float16, float32]"),
        (["model=hf"], "model.path: got '???'; allowed: a value"),
        (["model.device=gpu"], "model.device: got 'gpu'; allowed: auto, cpu, mps, cuda or cuda:N"),
        (["model.device_map=all"], "model.device_map: got 'all'; allowed: one of auto, balanced, balanced_low_0"),
        (["model.device_map=auto", "model.device=cpu"], "model.device: got 'cpu'; allowed: auto, since device_map"),
        (["model.attn_implementation=flash"], "model.attn_implementation: got 'flash'; allowed: one of auto, eager"),
        (["model.backend=vlm"], "model.backend: got 'vlm'; allowed: one of transformer_lens"),
        (["rating.seeds=[0,0]"], "rating.seeds: got [0, 0]; allowed: seeds that differ"),
        (["rating.seeds=[-1]"], "rating.seeds: got [-1]; allowed: seeds that are 0 or more"),
        (["rating.seeds=[]", "rating.exact=false", "probe=none"], "rating.seeds: got []; allowed: at least one seed"),
        (["rating.temperature=-1"], "rating.temperature: got -1.0; allowed: 0"),
        (["rating.temperature=inf"], "rating.temperature: got inf"),
        (["completer.top_p=0"], "completer.top_p: got 0.0; allowed: more than 0, at most 1"),
        (["completer.max_new_tokens=0"], "completer.max_new_tokens: got 0; allowed: 1 or more"),
        (["capture.layers=some"], "capture.layers: got 'some'; allowed: all, or a list of layer numbers"),
        (["capture.layers=[]"], "capture.layers: got []"),
        (["capture.layers=[1.5]"], "capture.layers: got [1.5]"),
        (["capture.positions=[last]"], "capture.positions: got 'last'; allowed: one of last_prompt, first_completion"),
        (["capture=none"], "probe.kind: got 'ridge'; allowed: none, since nothing is captured; or capture=residual"),
        (["model.backend=vllm"], "model.backend=vllm, which gives no residual vectors; add: capture=none probe=none"),
        (["probe.positions=[first_completion]"], "probe.positions: got 'first_completion'; allowed: a captured"),
        (["probe.positions=[]"], "probe.positions: got []; allowed: at least one position, or null for all captured"),
        (["rating.exact=false"], "probe.targets: got ['exact', 'sampled', 'single']; allowed: sampled or single"),
        (["rating.seeds=[]"], "probe.targets: got ['exact', 'sampled', 'single']; allowed: exact, since rating"),
        (["probe.targets=[good]"], "probe.targets: got 'good'; allowed: one of exact, sampled, single"),
        (["probe=logistic", "probe.targets=[exact]"], "probe.targets: got 'exact'; allowed: one of good, refused"),
        (["probe=logistic", "probe.targets=[refused]", "judge=none"], "probe.targets: got ['refused']; allowed: good"),
        (["probe=logistic", "probe.threshold=middle"], "probe.threshold: got 'middle'; allowed: midpoint, median or a"),
        (["probe.folds=1"], "probe.folds: got 1; allowed: 2 or more"),
        (["probe.penalties=[1,-1]"], "probe.penalties: got [-1.0]; allowed: at least one number, each more than 0"),
        (["probe.penalties=[]"], "probe.penalties: got []; allowed: at least one number, each more than 0"),
        (["probe=linear", "probe.learning_rate=0"], "probe.learning_rate: got 0.0; allowed: more than 0"),
        (["probe=linear", "probe.optimizer=adam"], "probe.optimizer: got 'adam'; allowed: one of adamw, sgd"),
        (["probe.controls.permutations=-1"], "probe.controls.permutations: got -1; allowed: 0 to 100000"),
        (["model=haiku"], "rating.exact: got True; allowed: false, since this model's server gives no"),
        (["dataset=file"], "dataset.path: got None; allowed: the path of a .jsonl or .csv file"),
        (["dataset=file", "dataset.path=/no/file.csv"], "got '/no/file.csv'; allowed: a file that exists"),
        (["dataset.limit=0"], "dataset.limit: got 0; allowed: 1 or more"),
        (["dataset.seed=-1"], "dataset.seed: got -1; allowed: seeds that are 0 or more"),
        (["dataset.kind=hub"], "dataset.sources: got {}; allowed: at least one source"),
        (["dataset=wildcat"], "dataset: got 'wildcat'; allowed: one of alpaca, bailbench, file, math, mini, mixed"),
        (["dataset=mixed", f"{WILDCHAT}.path=/no/folder"], f"{WILDCHAT}.path: got '/no/folder'; allowed: a folder or"),
        (["dataset=mixed", f"{WILDCHAT}.path=a/b/c"], f"{WILDCHAT}.path: got 'a/b/c'; allowed: a folder or file that"),
        (["dataset=mixed", f"{WILDCHAT}.pth=x"], f"{WILDCHAT}.pth: there is no such key; did you mean 'path'?"),
        (["dataset=wildchat", f"{WILDCHAT}.reader=chat"], "expected one of [columns, conversation]"),
        (["dataset=wildchat", f"{WILDCHAT}.prompt=[a,b]"], "got ['a', 'b']; allowed: the one column that holds"),
        (["dataset=wildchat", f"{WILDCHAT}.prompt=[]"], f"{WILDCHAT}.prompt: got []; allowed: at least one column"),
        (["dataset=wildchat", f"{WILDCHAT}.origin=' '"], f"{WILDCHAT}.origin: got ' '; allowed: some name"),
        (["dataset=wildchat", f"{WILDCHAT}.max_chars=0"], f"{WILDCHAT}.max_chars: got 0; allowed: 1 or more"),
        (["dataset.sources.own.path=a/b"], "dataset.sources.own: there is no such key"),
        (["judge.phrases=[]"], "judge.phrases: got []; allowed: at least one phrase"),
        (["wandb.mode=on"], "wandb.mode: got"),
        (["stats.target_r=1"], "stats.target_r: got 1.0"),
        (["template.anchored_precise.question=''"], "template.anchored_precise.question: got ''; allowed: some text"),
        (["template.anchored_precise.options=[]"], "template.anchored_precise.options: got []; allowed: two options"),
        ([f"{OPTIONS}=[{{say: '1', value: 2}},{{say: '2', value: 1}}]"], "got '1: 2.0'; allowed: numbers"),
        ([f"{OPTIONS}=[{{say: a, value: 1}},{{say: A, value: 2}}]"], "options that differ in more than case"),
        (["completer.condition=positive"], "completer.condition: got 'positive'; allowed: null, since no concept"),
        ([*CONCEPT, "rating.condition=good"], "rating.condition: got 'good'; allowed: one of positive, neutral, negat"),
        ([*CONCEPT, "rating.condition=neutral", "rating.system_prompt=Hi"], "rating.system_prompt: got 'Hi'; allowed"),
        (["concept=[liking_maths]"], "concept: got 'liking_maths'; allowed: liking_math, liking_poetry, or a file of"),
        ([*CONCEPT, f"{LIKING}.contrast=[positive]"], "contrast: got ['positive']; allowed: two conditions"),
        ([*CONCEPT, f"{LIKING}.contrast=[positive,bad]"], "contrast: got 'bad'; allowed: one of positive, neutral"),
        ([*CONCEPT, f"{LIKING}.conditions.positive=null", f"{LIKING}.conditions.negative=null"], "different system pr"),
        ([*CONCEPT, f"{LIKING}.conditions.positive=' '"], "conditions.positive: got ' '; allowed: some text, or null"),
        ([*CONCEPT, f"+{LIKING}.wordings.third.positive=Hi"], "wordings.third: got ['positive']; allowed: a system"),
        ([*CONCEPT, f"{LIKING}.origins=[]"], "origins: got []; allowed: at least one origin, or null for all"),
        ([*CONCEPT, f"{LIKING}.folds=1"], "folds: got 1; allowed: 2 or more"),
        (["concept=[liking_math,liking_poetry]", f"{LIKING}.name=liking_poetry"], "concepts with different names"),
        (["steering=concept"], "steering.vector: got 'concept'; allowed: a folder of saved vectors, since no concept"),
        (["steering=concept", "steering.vector=/no"], "steering.vector: got '/no'; allowed: concept, none, or a"),
        ([*STEERING, "steering.position=first_completion"], "steering.position: got 'first_completion'; allowed: a ca"),
        ([*STEERING, "steering.position=rating"], "steering.position: got 'rating'; allowed: one of last_prompt"),
        ([*STEERING, "steering.layers=[]"], "steering.layers: got []; allowed: at least one layer number"),
        ([*STEERING, "steering.coefficients=[1,1]"], "steering.coefficients: got [1.0, 1.0]; allowed: two or more"),
        ([*STEERING, "steering.coefficients=[1,inf]"], "steering.coefficients: got [1.0, inf]; allowed: two or more"),
        ([*STEERING, "steering.unit=sd"], "steering.unit: got 'sd'; allowed: one of vector, norm"),
        ([*STEERING, "steering.at=answer"], "steering.at: got 'answer'; allowed: one of all, last, completion, quest"),
        ([*STEERING, "rating.exact=false", "probe=none"], "rating.exact: got False; allowed: true, since steered"),
        ([*STEERING, "steering.controls.random=-1"], "steering.controls.random: got -1; allowed: 0 to 1000"),
        ([*STEERING, "steering.coherence.perplexity=nan"], "steering.coherence.perplexity: got nan; allowed: 0 or"),
        ([*STEERING, "steering.coeficients=[1]"], "steering.coeficients: there is no such key; did you mean 'coeffici"),
        (["experiment=smoke"], "Could not override 'experiment'"),
        (["template=[a"], "no viable alternative at input '[a'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(overrides, expected):
    assert expected in message(*overrides)


@pytest.fixture
def own_folder(tmp_path):
    """Compose from a folder of a user's own YAML files beside the shipped ones."""
    GlobalHydra.instance().clear()
    (tmp_path / "main.yaml").write_text(f"defaults:\n  - config\n  - _self_\nhydra:\n  searchpath: [file://{CONF}]\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        yield tmp_path


def test_a_users_own_template_of_any_scale(own_folder):
    (own_folder / "template").mkdir()
    (own_folder / "template" / "mine.yaml").write_text(
        "mine:\n  name: from_0_to_10\n  question: From 0 to 10?\n  options:\n"
        + "".join(f"    - {{say: '{n}', value: {n}}}\n" for n in range(11))
    )
    config = typed(compose("main", overrides=["template=mine"]))
    assert [option.value for option in config.template["mine"].options] == list(range(11))


def test_a_users_own_concept(own_folder):
    (own_folder / "concept").mkdir()
    text = "mine:\n  name: mine\n  conditions: {kind: Be kind., plain: null}\n  contrast: [kind, plain]\n"
    (own_folder / "concept" / "mine.yaml").write_text(text)
    config = typed(compose("main", overrides=["concept=[mine]", "completer.condition=kind"]))
    assert (config.concept["mine"].origins, config.completer.system_prompt) == (None, "Be kind.")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.api.base_url=api.openai.com", "model.api.base_url: got 'api.openai.com'; allowed: the address"),
        ("model.api.base_url=http://127.0.0.1:99999/v1", "model.api.base_url: got 'http://127.0.0.1:99999/v1'"),
        ("model.api.base_url=https://me:secret@host/v1", "model.api.base_url: got 'one with a password'"),
        ("model.api.concurrency=0", "model.api.concurrency: got 0; allowed: 1 or more"),
        ("model.api.top_logprobs=50", "model.api.top_logprobs: got 50; allowed: 0 to 20"),
        ("model.api.timeout_s=0", "model.api.timeout_s: got 0.0; allowed: seconds, more than 0"),
        ("model.thinking={enabled: true, force_close: true}", "model.thinking.force_close: got True; allowed: false"),
        ("model.prefill=Answer", "model.prefill: got 'Answer'; allowed: '' unless the server can go on"),
    ],
)
def test_a_served_model_is_checked_before_it_is_asked(override, expected):
    line = message("model=hf", "model.path=tiny", "model.backend=openai", override)
    assert line.startswith(expected)
    assert "secret" not in line
