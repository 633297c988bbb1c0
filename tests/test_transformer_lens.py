"""The TransformerLens engine against plain transformers, and batches against single rows, in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import template
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


def walked(plain, tokenizer, ids, words: Sequence[Sequence[str]], least: float = 1e-4) -> list[float]:
    """P(an answer begins with an option), by following all tokens, of any length, that an option's text begins with."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    blanks = [""] if tokenizer.decode(list(ids)).endswith(" ") else ["", " "]
    spelled = {
        blank + case: option
        for option, of_option in enumerate(words)
        for word in of_option
        for case in (word, word.lower(), word.capitalize())
        for blank in blanks
    }
    masses, digits = [0.0] * len(words), torch.tensor([text[:1].isdecimal() for text in texts])
    pending = [("", 1.0, tuple(ids), None)]
    while pending:
        text, p, so_far, last = pending.pop()
        following = p * plain(torch.tensor([so_far])).logits[0, -1].double().softmax(dim=-1)
        on = [n for n in following.topk(500).indices.tolist() if any(s.startswith(text + texts[n]) for s in spelled)]
        for token in on:
            longer, reached = text + texts[token], float(following[token])
            now = spelled.get(longer, last)
            if reached > least:
                pending.append((longer, reached, (*so_far, token), now))
            elif now is not None:
                masses[now] += reached
        if last is not None:
            following[on] = 0.0
            masses[last] += float(following[~digits].sum() if text[-1:].isdecimal() else following.sum())
    return masses


@torch.inference_mode()
@pytest.mark.parametrize(
    "name", ["anchored", *(pytest.param(name, marks=pytest.mark.slow) for name in ("likert", "agreement"))]
)
def test_option_masses_equal_a_walk_through_all_answers(backend, plain, name):
    asked = question(name)
    ((reply,),) = observe(backend, CONVERSATIONS[:1], [asked])
    prompt = encode_prompt(backend.encoder, CONVERSATIONS[0], asked)
    # What goes through tokens that no tokenizer writes an option with ("Ag", "ree") is missing, as the docs say.
    missing = np.array(walked(plain, backend.encoder.tokenizer, prompt.ids, asked.words)) - reply.scores[0].mass
    assert missing.min() > -1e-4  # of what the walk does not follow
    assert missing.max() < 5e-3


@torch.inference_mode()
def test_an_option_that_opens_another(backend, plain):
    """And the numbers that are none: "1" is neither "10" nor "17", and "10" is not "100"."""
    one_to_ten = Question("How likely is it, from 1 to 10?", tuple(str(n) for n in range(1, 11)))
    ((reply,),) = observe(backend, CONVERSATIONS[:1], [one_to_ten])
    prompt = encode_prompt(backend.encoder, CONVERSATIONS[0], one_to_ten)
    digits = [backend.encoder.tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]

    def after(*tokens: int) -> torch.Tensor:
        return plain(torch.tensor([[*prompt.ids, *tokens]])).logits[0, -1].double().softmax(dim=-1)

    p_one, behind = float(after()[digits[1]]), after(digits[1])
    one = p_one * float(1 - behind[digits].sum())
    ten = p_one * float(behind[digits[0]] * (1 - after(digits[1], digits[0])[digits].sum()))
    assert reply.scores[0].mass[0] == pytest.approx(one, rel=1e-3)
    assert reply.scores[0].mass[9] == pytest.approx(ten, rel=1e-3)


def test_samples_follow_the_distribution_of_the_options_and_the_likeliest_is_chosen(backend):
    """Answers of two tokens at 600 seeds, as they are read, against the exact masses of the same question."""
    asked, two_tokens = question("anchored"), dataclasses.replace(SAMPLING, max_new_tokens=2)
    ((reply,),) = observe(backend, CONVERSATIONS[:1], [asked], two_tokens, seeds=tuple(range(600)))
    values = [template("anchored").read(sample.text) for sample in reply.samples.values()]
    counts = [values.count(value) for value in template("anchored").values]
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
