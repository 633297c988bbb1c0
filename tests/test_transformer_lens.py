"""The TransformerLens engine against plain transformers, and batches against single rows, in float32."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from engine_calls import CONVERSATIONS, PROMPTS, complete, observe, question, replies
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from prefs.config import POSITIONS
from prefs.errors import UserError
from prefs.models.embedded import smollm2_folder
from prefs.models.loading import Models
from prefs.models.prompts import encode_prompt
from prefs.models.types import Capture, Question, Request, Sampling

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=8)
EVERYTHING = Capture(tuple(range(30)), POSITIONS)


@pytest.fixture(scope="module")
def plain():
    return AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()


def test_a_batch_equals_its_rows_one_at_a_time(backend):
    asked = [question("anchored"), question("likert")], SAMPLING
    wanted = {"seeds": (0, 1, 2, 3, 4), "capture": EVERYTHING}
    for conversation, together in zip(CONVERSATIONS, observe(backend, CONVERSATIONS, *asked, **wanted), strict=True):
        (alone,) = observe(backend, [conversation], *asked, **wanted)
        for one, many in zip(alone, together, strict=True):
            np.testing.assert_allclose(one.scores[0].mass, many.scores[0].mass, rtol=1e-3, atol=1e-7)
            assert one.samples == many.samples
            assert one.residuals.keys() == many.residuals.keys() == set(POSITIONS)
            for position, vectors in one.residuals.items():
                torch.testing.assert_close(vectors, many.residuals[position], atol=5e-2, rtol=1e-3)


@pytest.mark.slow
def test_completions_of_a_batch_equal_single_ones_and_seeds_share_the_prompt(backend):
    sampling = Sampling(1.0, 0.95, 8)
    together = complete(backend, PROMPTS, 3, sampling)
    assert together == [complete(backend, [prompt], 3, sampling)[0] for prompt in PROMPTS]
    assert complete(backend, PROMPTS[::-1], 3, sampling) == together[::-1]
    other = complete(backend, PROMPTS, 4, sampling)
    assert together != other
    spent = backend.usage()
    both = replies(backend, [Request(prompt, sampling=sampling, seeds=(4, 3)) for prompt in PROMPTS])
    assert [(reply.samples[3], reply.samples[4]) for reply in both] == list(zip(together, other, strict=True))
    prompts = sum(backend.tokens(Request(prompt, sampling=sampling, seeds=(0,))) for prompt in PROMPTS)
    assert backend.usage().since(spent).prompt_tokens == prompts


@torch.inference_mode()
@pytest.mark.parametrize("name", [pytest.param("anchored", marks=pytest.mark.slow), "agreement"])
def test_option_masses_equal_whole_strings_scored_one_by_one(backend, plain, name):
    for conversation, (reply,) in zip(
        CONVERSATIONS, observe(backend, CONVERSATIONS[:2], [question(name)]), strict=False
    ):
        prompt = encode_prompt(backend.encoder, conversation, question(name))
        for tail, mass in zip(prompt.tails, reply.scores[0].mass, strict=True):
            log_probs = plain(torch.tensor([prompt.ids + tail])).logits[0].log_softmax(dim=-1)
            places = range(len(prompt.ids) - 1, len(prompt.ids) + len(tail) - 1)
            expected = sum(float(log_probs[place, token]) for place, token in zip(places, tail, strict=True))
            assert np.log(mass) == pytest.approx(expected, abs=2e-3)


@torch.inference_mode()
def test_an_option_that_opens_another(backend, plain):
    one_to_ten = Question("How likely is it, from 1 to 10?", tuple(str(n) for n in range(1, 11)))
    ((reply,),) = observe(backend, CONVERSATIONS[:1], [one_to_ten])
    prompt = encode_prompt(backend.encoder, CONVERSATIONS[0], one_to_ten)
    after_one = plain(torch.tensor([prompt.ids + prompt.tails[0]])).logits[0].softmax(dim=-1)
    p_one = float(after_one[len(prompt.ids) - 1, prompt.tails[0][0]])
    p_ten = p_one * float(after_one[-1, prompt.tails[9][1]])
    assert reply.scores[0].mass[0] == pytest.approx(p_one - p_ten, rel=1e-3)
    assert reply.scores[0].mass[9] == pytest.approx(p_ten, rel=1e-3)


def test_samples_follow_the_distribution_of_the_options_and_the_likeliest_is_chosen(backend):
    """One-token answers of 600 seeds against the exact masses of the same question."""
    asked = question("anchored")
    one_token = dataclasses.replace(SAMPLING, max_new_tokens=1)
    ((reply,),) = observe(backend, CONVERSATIONS[:1], [asked], one_token, seeds=tuple(range(600)))
    texts = [sample.text.strip() for sample in reply.samples.values()]
    counts = [texts.count(say) for say in asked.options]
    mass = np.array(reply.scores[0].mass)
    assert chisquare([*counts, 600 - sum(counts)], 600 * np.array([*mass, 1 - mass.sum()])).pvalue > 1e-3
    (chosen,) = replies(backend, [Request(CONVERSATIONS[0], asked, choose=True)])
    assert chosen.choice == asked.options[int(mass.argmax())]


def test_a_question_without_a_conversation_before_it(backend):
    asked = question("anchored")
    ((reply,),) = observe(backend, [()], [asked], SAMPLING, seeds=(0,), capture=Capture((3,), ("rating",)))
    (chosen,) = replies(backend, [Request((), asked, choose=True)])
    assert chosen.choice == asked.options[int(np.argmax(reply.scores[0].mass))]
    assert reply.residuals["rating"].shape == (1, 576)


def test_temperature_0_takes_the_likeliest_token(backend):
    greedy = Sampling(0.0, 1.0, 12)
    first, second = (complete(backend, PROMPTS[:1], seed, greedy)[0] for seed in (0, 1))
    assert first == second
    ids = torch.tensor([backend.encoder.encode(PROMPTS[0], answer="").ids])
    expected = backend.bridge.original_model.generate(ids, max_new_tokens=12, do_sample=False)
    assert first.text == backend.encoder.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no config.json"),
        (["config.json"], r"has no weights \(\*.safetensors\)"),
        (["config.json", "tokenizer.json", "empty"], "cannot load"),
    ],
)
def test_a_folder_that_is_no_model_is_one_line(tmp_path, smollm2_fp32, files, message):
    for name in files:
        if name == "empty":
            (tmp_path / "model.safetensors").write_bytes(b"")
        else:
            (tmp_path / name).write_bytes((smollm2_folder() / name).read_bytes())
    with pytest.raises(UserError, match=message) as caught:
        Models().get(dataclasses.replace(smollm2_fp32, path=str(tmp_path)))
    assert "\n" not in str(caught.value)
