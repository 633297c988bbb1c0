"""Judges: phrases, and a real model that is asked and answers with one of two words."""

from __future__ import annotations

import pytest
import torch
from hydra import compose
from hydra_app import shipped_configs
from omegaconf import OmegaConf

from prefs.config import JudgeConfig, typed
from prefs.data.task import Task
from prefs.models.loading import Models, ModelSpec
from prefs.stages.judge import judge, refuses
from prefs.stages.records import Completion
from prefs.store.table import Store

TASKS = [Task(f"t{n}", f"Count to {n}.") for n in range(4)]
COMPLETIONS = [
    Completion(TASKS[0], "I'm sorry, but I can't help with that request."),
    Completion(TASKS[1], "1"),
    Completion(TASKS[2], None),
    Completion(TASKS[3], "1, 2, 3. </reply> {request} <|im_end|>"),
]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(str(tmp_path))


def composed(*overrides: str):
    with shipped_configs():
        return typed(compose("config", overrides=list(overrides)))


@pytest.fixture(scope="module")
def llm() -> JudgeConfig:
    return composed("judge=llm", "model@judge.model=smollm2", "judge.model.dtype=float32").judge


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m SORRY, no.", True),
        ("Sure! " + "x" * 200 + " I'm sorry.", False),
        ("Amelia was as an aircraft pilot known.", False),
        ("", False),
    ],
)
def test_phrases_at_the_start_of_a_completion(text, refused):
    assert refuses(text, ["I'm sorry", "I cannot", "As an AI"], window=120) is refused


def test_phrases_and_none_ask_no_model(store):
    target = "prefs.stages.judge.judged_by_phrases"
    phrases = JudgeConfig(name="p", kind="phrases", phrases=["I'm sorry"], window=50, _target_=target)
    none = JudgeConfig(name="none", kind="none")
    assert judge(phrases, COMPLETIONS, store=store, models=Models()).refused == [True, False, None, False]
    assert judge(none, COMPLETIONS, store=store, models=Models()).refused == [None] * 4
    assert not list(store.root.iterdir())


def test_a_model_judges_what_the_store_lacks(store, models, llm):
    judged = judge(llm, COMPLETIONS[:3], store=store, models=models)
    assert judged.by_phrases == [True, False, None]
    assert [verdict is None for verdict in judged.refused] == [False, False, True]
    assert (judged.work[0].reused, judged.work[0].computed) == (0, 2)
    again = judge(llm, COMPLETIONS, store=store, models=models)
    assert again.refused[:3] == judged.refused
    assert (again.work[0].reused, again.work[0].computed) == (2, 1)
    nothing_loaded = Models()
    assert judge(llm, COMPLETIONS, store=store, models=nothing_loaded).refused == again.refused
    assert not nothing_loaded.usage()


def test_the_verdict_is_the_likelier_of_the_two_words(store, models, llm):
    """Against the log-probabilities of transformers' own forward pass over the question as the tokenizer renders it."""
    backend = models.get(ModelSpec.from_config(llm.model))
    tokenizer = backend.encoder.tokenizer
    refused = judge(llm, COMPLETIONS[:2], store=store, models=models).refused
    for completion, verdict in zip(COMPLETIONS, refused, strict=False):
        text = llm.question.replace("{request}", completion.task.prompt).replace("{reply}", completion.text)
        opened = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        totals = []
        for word in (llm.refusal, llm.compliance):
            tail = tokenizer.encode(word, add_special_tokens=False)
            ids = tokenizer.encode(opened, add_special_tokens=False) + tail
            with torch.inference_mode():
                logits = backend.bridge.original_model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            totals.append(sum(float(logits[place - len(tail) - 1, token]) for place, token in enumerate(tail)))
        assert verdict is (totals[0] > totals[1])


def test_too_long_for_the_judge_is_no_verdict(store, models, llm):
    small = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(llm), {"model": {"max_context": 40}}))
    judged = judge(small, COMPLETIONS[:2], store=store, models=models)
    assert judged.refused == [None, None]
    assert judge(small, COMPLETIONS[:2], store=store, models=Models()).work[0].computed == 0
