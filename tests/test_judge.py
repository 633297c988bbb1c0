"""Judges: phrases, on openings as the families that ship write them; and a real model that is asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose
from hydra_app import shipped_configs
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from prefs.config import JudgeConfig, typed
from prefs.data.task import Task
from prefs.models.loading import Models, ModelSpec
from prefs.models.size import billions
from prefs.results.judges import judges
from prefs.stages.judge import Judged, judge, judging_model
from prefs.stages.phrases import refuses
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


OPENINGS = [line.split("\t") for line in (Path(__file__).parent / "refusal_openings.tsv").read_text().splitlines()[1:]]


def asked(config: JudgeConfig) -> ModelSpec:
    assert config.model is not None
    return ModelSpec.from_config(config.model)


@pytest.mark.parametrize(("family", "refusal", "opening"), OPENINGS, ids=[row[2][:60] for row in OPENINGS])
def test_openings_of_the_families_that_ship(family, refusal, opening):
    assert refuses(opening.replace("\\n", "\n")) is (refusal == "yes")


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("", False),
        ("...", False),
        ("I can't help with that.", True),
        ("**I** _can’t_ ~~ever~~ `help` with that 🙏", True),
        ("> ## I **cannot**\n\nand will not\nwrite it", True),
        ("x " * 300 + "I can't help with that.", False),
        ("\"I can't help with that", False),  # a quotation that was cut off
        ("I am not a poet but a toaster.", False),
    ],
)
def test_what_counts_is_the_opening_without_decoration(text, refused):
    assert refuses(text) is refused


def test_further_phrases_and_the_window_are_the_users():
    text = "Alas, poor *Yorick*! " + "x" * 600 + " I can't help with that."
    assert (refuses(text, window=0), refuses(text)) == (True, False)
    assert refuses(text, ["alas, poor Yorick"], window=50)
    assert not refuses(text, ["las, poor"], window=50)
    assert not refuses(text, ["Yorick"], window=5)


def test_phrases_and_none_ask_no_model(store):
    target = "prefs.stages.judge.judged_by_phrases"
    phrases = JudgeConfig(name="p", kind="phrases", _target_=target)
    none = JudgeConfig(name="none", kind="none")
    assert judge(phrases, COMPLETIONS, model=None, store=store, models=Models()).refused == [True, False, None, False]
    assert judge(none, COMPLETIONS, model=None, store=store, models=Models()).refused == [None] * 4
    assert not list(store.root.iterdir())


def test_a_model_judges_what_the_store_lacks(store, models, llm):
    judged = judge(llm, COMPLETIONS[:3], model=asked(llm), store=store, models=models)
    assert judged.by_phrases == [True, False, None]
    assert [verdict is None for verdict in judged.refused] == [False, False, True]
    assert (judged.work[0].reused, judged.work[0].computed) == (0, 2)
    again = judge(llm, COMPLETIONS, model=asked(llm), store=store, models=models)
    assert again.refused[:3] == judged.refused
    assert (again.work[0].reused, again.work[0].computed) == (2, 1)
    nothing_loaded = Models()
    assert judge(llm, COMPLETIONS, model=asked(llm), store=store, models=nothing_loaded).refused == again.refused
    assert not nothing_loaded.usage()


def test_the_verdict_is_the_likelier_of_the_two_words(store, models, llm):
    """Against the log-probabilities of transformers' own forward pass over the question as the tokenizer renders it."""
    backend = models.get(ModelSpec.from_config(llm.model))
    tokenizer = backend.encoder.tokenizer
    refused = judge(llm, COMPLETIONS[:2], model=asked(llm), store=store, models=models).refused
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


@pytest.mark.parametrize(
    ("path", "backend", "size"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "transformer_lens", 8),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "vllm", 56),
        ("Qwen/Qwen3-30B-A3B", "vllm", 30),
        ("/models/qwen3-1.7b/", "transformer_lens", 1.7),
        ("qwen2.5:7b", "openai", 7),
        ("embedded:smollm2", "transformer_lens", 0.135),
        ("vendor/large-4bit-2024", "openai", None),
        ("/nowhere/large", "transformer_lens", None),
    ],
)
def test_a_model_says_how_large_it_is(path, backend, size):
    assert billions(ModelSpec("m", path, backend)) == size


def test_a_size_that_no_name_tells_is_counted_from_the_config(tmp_path):
    config = LlamaConfig(
        vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    config.save_pretrained(tmp_path / "mine")
    parameters = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert billions(ModelSpec("m", str(tmp_path / "mine"))) == parameters / 1e9


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        (["+experiment=refusals"], None),
        (["+experiment=refusals", "model=llama8b"], "llama8b"),
        (
            ["+experiment=refusals", "model=hf", "model.path=mistralai/Mistral-7B-Instruct-v0.3"],
            "Mistral-7B-Instruct-v0.3",
        ),
        (["+experiment=refusals", "model=llama70b", "completer=qwen1_7b"], None),
        (["+experiment=refusals", "completer=llama8b"], "llama8b"),
        (["judge=llm", "model@judge.model=smollm2"], "smollm2"),
        (["judge=phrases", "model=llama70b"], None),
    ],
)
def test_a_completer_of_7_billion_parameters_judges_itself(overrides, asked):
    config = composed(*overrides)
    completer = ModelSpec.from_config(config.completer.model or config.model)
    model = judging_model(config.judge, completer)
    assert (model and model.name) == asked


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("google/gemma-3-27b-it", []),
        ("/models/final", ["family of final"]),
        ("mistralai/Mistral-7B", ["family of Mistral-7B"]),
        ("embedded:smollm2", ["smollm2 is not known to have 7 billion"]),
    ],
)
@pytest.mark.parametrize(("refusals", "harmful"), [(0, ["BAILBENCH"]), (1, ["BAILBENCH"]), (0, ["MATH"])])
def test_where_phrases_are_likely_blind_a_caution_says_so(model, wanted, refusals, harmful):
    spec = ModelSpec(model.rpartition("/")[2].removeprefix("embedded:"), model)
    made = [Completion(Task(f"t{n}", "Do it.", "BAILBENCH"), "No.") for n in range(6)]
    job = SimpleNamespace(
        config=composed("judge=llm" if "smollm2" in model else "judge=phrases", f"dataset.harmful={harmful}"),
        roles=SimpleNamespace(completer=spec),
        completions=made,
        judged=Judged([n < refusals for n in range(6)]),
    )
    doubtful = not refusals and harmful == ["BAILBENCH"]
    wanted = [*wanted, *["No refusal was found among 6 tasks of BAILBENCH"] * doubtful]
    remarks = judges(job).remarks
    assert len(remarks) == len(wanted)
    assert all(text in remark for text, remark in zip(wanted, remarks, strict=True))


def test_too_long_for_the_judge_is_no_verdict(store, models, llm):
    small = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(llm), {"model": {"max_context": 40}}))
    judged = judge(small, COMPLETIONS[:2], model=asked(small), store=store, models=models)
    assert judged.refused == [None, None]
    assert judge(small, COMPLETIONS[:2], model=asked(small), store=store, models=Models()).work[0].computed == 0
