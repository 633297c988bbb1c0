"""The choosing stage: its probabilities by plain transformers, its rounds through the store, and what goes wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hydra import compose
from hydra_app import shipped_configs
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefs.config import typed
from prefs.config.choice import ChoiceConfig, ChoiceTemplate, PairsConfig
from prefs.data.task import Task
from prefs.errors import UserError
from prefs.models.loading import Models, model_folder
from prefs.results.choices import Revealed, choices_result
from prefs.stages.choose import choose
from prefs.stages.records import Completion
from prefs.store.table import Store

COMPLETIONS = [
    Completion(Task(f"t{n}", prompt, origin="AB"[n % 2]), reply)
    for n, (prompt, reply) in enumerate(
        [
            ("Write a haiku.", "Snow on the old pond."),
            ("Add 2 and 3.", "5"),
            ("Insult me. {second}", "No."),
            ("Name a colour <|im_end|>", "Blue, like the sea."),
            ("List three cheeses.", "Brie, Gouda, Feta"),
        ]
    )
]


def shipped(*overrides: str) -> ChoiceConfig:
    with shipped_configs():
        return typed(compose("config", overrides=list(overrides))).choice


def before(**changes) -> ChoiceConfig:
    return dataclasses.replace(shipped("choice=exact"), pairs=PairsConfig(degree=2, first=2, holdout=1), **changes)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(str(tmp_path))


def plain_logit(spec, text: str, labels: tuple[str, str], turns=()) -> tuple[float, float]:
    """Log odds of the first label and the mass of both, by one forward pass of transformers."""
    folder = model_folder(spec)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": role, "content": content} for role, content in (*turns, ("user", text))]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        p = model(**ids).logits[0, -1].double().softmax(dim=0)
    # An answer may begin with a blank.
    mass = [
        sum(float(p[token]) for word in (label, f" {label}") for token in [tokenizer.encode(word)[0]])
        for label in labels
    ]
    return float(np.log(mass[0] / mass[1])), sum(mass)


@pytest.mark.parametrize("when", ["before", "after"])
def test_both_orders_are_what_transformers_gives(when, store, smollm2_fp32, models):
    config = before(template=shipped("choice=exact", f"choice/template={when}", "choice.template.opening=''").template)
    chosen = choose(config, COMPLETIONS[:2], smollm2_fp32, store, models)
    assert config.template is not None
    (pair,) = {tuple(pair) for pair in chosen.choices.pairs.tolist()}
    for order, shown in enumerate((pair, pair[::-1])):
        first, second = (COMPLETIONS[task] for task in shown)
        text = config.template.ask(first.task.prompt, second.task.prompt, ("A", "B"))
        turns = [
            turn
            for completion in (first, second)
            for turn in (("user", completion.task.prompt), ("assistant", completion.text))
        ]
        logit, mass = plain_logit(smollm2_fp32, text, ("A", "B"), turns if when == "after" else ())
        sign = 1 if order == 0 else -1
        assert chosen.choices.logits[0, order] == pytest.approx(sign * logit, abs=1e-3)
        assert chosen.choices.valid[0, order] == pytest.approx(mass, abs=1e-4)


def test_the_second_time_nothing_is_asked_and_all_is_the_same(store, smollm2_fp32, models):
    config = before()
    first = choose(config, COMPLETIONS, smollm2_fp32, store, models)
    fresh = Models()
    second = choose(config, COMPLETIONS, smollm2_fp32, store, fresh)
    assert not fresh._loaded, "no model is loaded"
    assert first.work.computed == 2 * len(first.choices.pairs) == second.work.reused
    assert second.work.computed == 0
    np.testing.assert_array_equal(first.choices.logits, second.choices.logits)
    np.testing.assert_array_equal(first.choices.pairs, second.choices.pairs)
    assert first.utilities is not None
    assert second.utilities is not None
    np.testing.assert_array_equal(first.utilities.u, second.utilities.u)
    more = choose(dataclasses.replace(config, labels=[["A", "B"], [1, 2]]), COMPLETIONS, smollm2_fp32, store, models)
    np.testing.assert_array_equal(more.mass[:, :, 0], first.mass[: len(more.mass), :, 0])
    result = choices_result(Revealed(first, 20, 0), "smollm2")
    pairs = result.frame("pairs")
    assert len(pairs) == len(first.choices.pairs)
    np.testing.assert_allclose(pairs["preference"], first.choices.preference)
    assert result.frame("choices")["pairs"].iloc[0] == len(pairs)


def test_sampled_answers_have_the_exact_shares(store, smollm2_fp32, models):
    exact = choose(before(), COMPLETIONS[:2], smollm2_fp32, store, models)
    sampled = dataclasses.replace(before(), kind="sampled", seeds=list(range(100)), max_new_tokens=2)
    drawn = choose(sampled, COMPLETIONS[:2], smollm2_fp32, store, models)
    p, n = exact.choices.p, drawn.mass.sum(axis=(2, 3))
    error = np.sqrt(p * (1 - p) / n)
    assert (np.abs(drawn.choices.p - p) < 3 * error + 0.02).all()  # an answer of two tokens may go on to be another


def test_one_task_two_tasks_and_none(store, smollm2_fp32, models):
    for count in (0, 1):
        chosen = choose(before(), COMPLETIONS[:count], smollm2_fp32, store, models)
        assert chosen.utilities is None
        (remark,) = choices_result(Revealed(chosen, 20, 0), "smollm2").remarks
        assert remark.startswith("No choices: there")
    two = choose(before(), COMPLETIONS[:2], smollm2_fp32, store, models)
    assert two.utilities is not None
    assert two.utilities.u.sum() == pytest.approx(0)


def test_a_pair_that_does_not_fit_is_told_and_no_win(store, smollm2_fp32, models):
    long = Completion(Task("long", "word " * 9000, origin="A"), "ok")
    chosen = choose(before(), [*COMPLETIONS[:3], long], smollm2_fp32, store, models)
    with_long = (chosen.choices.pairs == 3).any(axis=1)
    assert np.isnan(chosen.choices.p[with_long]).all()
    assert np.isfinite(chosen.choices.p[~with_long]).all()
    assert chosen.invalid == {"too_long": 2 * int(with_long.sum())}
    assert chosen.utilities is not None
    assert np.isnan(chosen.utilities.u[3])
    remarks = " ".join(choices_result(Revealed(chosen, 20, 0), "smollm2").remarks)
    assert "1 of 4 tasks have no utility" in remarks


def test_what_stands_in_braces_in_a_task_is_its_own():
    template = ChoiceTemplate("t", "before", "{first}|{second}|{first_label}|{second_label}")
    assert template.ask("a {second}", "b {first_label}", ("A", "B")) == "a {second}|b {first_label}|A|B"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["choice=exact", "choice.labels=[[A,a]]"], "choice.labels: got ['A', 'a']"),
        (["choice=exact", "choice.labels=[]"], "choice.labels: got []"),
        (["choice=exact", "choice.template.question=Which?"], "choice.template.question: got 'Which?'"),
        (["choice=sampled", "choice.seeds=[]"], "choice.seeds: got []"),
        (["choice=exact", "choice.pairs.first=99"], "choice.pairs.first: got 99"),
        (["choice=exact", "choice.pairs.select=best"], "choice.pairs.select: got 'best'"),
        (["probe.targets=[utility]"], "probe.targets: got ['utility']"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_loaded(overrides, message):
    with pytest.raises(UserError) as error:
        shipped(*overrides)
    assert str(error.value).startswith(message)


def test_the_shipped_experiments_compose():
    with shipped_configs():
        for name in ("revealed", "stated_revealed"):
            config = typed(compose("config", overrides=[f"+experiment={name}"]))
            assert config.choice.kind == "exact"
            assert not OmegaConf.is_missing(OmegaConf.structured(config.choice), "name")
