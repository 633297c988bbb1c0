"""The engine for OpenAI-compatible servers against one that fails in every way a test can think of."""

from __future__ import annotations

import dataclasses
import logging
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import template
from engine_calls import replies
from fault_server import Asked, FaultServer, Say, chat, error, likeliest, serving

from prefs.config import ApiConfig, ThinkingConfig
from prefs.data.task import Task
from prefs.data.template import Invalid
from prefs.errors import ConfigError, UserError
from prefs.models.loading import Models, ModelSpec, identity
from prefs.models.openai import server as served
from prefs.models.openai.engine import OpenAIEngine
from prefs.models.sampling import row_seed
from prefs.models.types import Capture, Message, Question, Request, Sample, Sampling, Score
from prefs.results import answers as results
from prefs.stages.complete import complete
from prefs.stages.rate import rate
from prefs.stages.records import Completion
from prefs.store.table import Store

KEY = "key_0123456789abcdef"
SHORT = Sampling(1.0, 1.0, 5)
SCALE = Question("How much, from 1 to 5?", ("1", "2", "3", "4", "5"))
TO_TEN = Question("0 to 10?", tuple(str(value) for value in range(11)))
VERDICT = ("refusal", "compliance")
THINKS = ThinkingConfig(max_tokens=100)
NO_LOGPROBS = r"gives no log-probabilities of tiny .*rating.exact=false"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PREFS_TEST_KEY", KEY)
    monkeypatch.setattr(served, "FIRST_WAIT_S", 0.01)


def spec_of(server: FaultServer, **changes) -> ModelSpec:
    api = {"concurrency": 4, "max_retries": 3, "timeout_s": 20.0, "key_env": "PREFS_TEST_KEY"}
    own = {name: changes.pop(name) for name in list(changes) if name in ApiConfig.__dataclass_fields__}
    api = ApiConfig(base_url=server.base_url, **{**api, **own})
    return ModelSpec(name="tiny", path="tiny", backend="openai", dtype="served", api=api, **changes)


@contextmanager
def serving_engine(answer, models: Say | None = None, **changes) -> Iterator[tuple[OpenAIEngine, FaultServer]]:
    with serving(answer, models) as server:
        engine = OpenAIEngine.load(spec_of(server, **changes))
        try:
            yield engine, server
        finally:
            engine.close()


def conversation(prompt: str, completion: str | None = None) -> tuple[Message, ...]:
    turns = (Message("user", prompt),)
    return turns if completion is None else (*turns, Message("assistant", completion))


def to_complete(*prompts: str, seed: int = 0, sampling: Sampling = SHORT) -> list[Request]:
    return [Request(conversation(prompt), sampling=sampling, seeds=(seed,)) for prompt in prompts]


def to_rate(*prompts: str, question: Question = SCALE, seeds=(), scores=()) -> list[Request]:
    return [
        Request(conversation(prompt, "c"), question, sampling=SHORT, seeds=seeds, scores=scores) for prompt in prompts
    ]


(OPENED,) = to_rate("p", question=dataclasses.replace(SCALE, prefill="Answer: "), seeds=(0,))
(SCORED,) = to_rate("p", scores=(0,))


def to_choose(*prompts: str) -> list[Request]:
    return [Request((), Question(prompt, VERDICT), choose=True) for prompt in prompts]


def samples(engine: OpenAIEngine, *prompts: str, **options) -> list[Sample]:
    return [sample for reply in replies(engine, to_complete(*prompts, **options)) for sample in reply.samples.values()]


def texts(engine: OpenAIEngine, *prompts: str, **options) -> list[str | None]:
    return [sample.text for sample in samples(engine, *prompts, **options)]


def scores(engine: OpenAIEngine, *prompts: str, question: Question = SCALE) -> list[Score]:
    return [reply.scores[0] for reply in replies(engine, to_rate(*prompts, question=question, scores=(0,)))]


def echo(asked: Asked) -> Say:
    return Say(chat(f"re: {asked.prompt}"))


# One fault a prompt, once; then the answer.
FAULTS = {
    "limited": error("slow down", 429, code="rate_limit_exceeded"),
    "limited with a time": Say({"error": "slow"}, status=429, headers={"Retry-After-Ms": "50"}),
    "broken": Say(b"<html><h1>Internal Server Error</h1></html>", status=500),
    "conflict": error("locked", 409),
    "drips": Say(chat("too late as well"), drip=True),
    "hangs": Say(chat("too late"), hang=True),
    "cut off": Say(chat("an answer that is cut off in the middle"), cut_off=True),
    "not JSON": Say(b'{"choices": [{"message": '),
    "text": Say(b"upstream busy", headers={"Content-Type": "text/plain"}),
    "no choices": Say({**chat("x"), "choices": []}),
    "no message": Say({**chat("x"), "choices": [{"index": 0}]}),
    "no content": Say(chat(None)),
    "an error in a 200": Say({"error": {"message": "provider returned error", "code": 502}}),
    "an error in a choice": Say(chat("half an ans", finish="error")),
}


def stored(store: Store, kind: str) -> list[dict[str, Any]]:
    return [row for part in sorted((store.root / kind).rglob("*.parquet")) for row in pq.read_table(part).to_pylist()]


def run(store: Store, spec: ModelSpec, tasks: list[Task]):
    models = Models()
    try:
        return complete(tasks, spec, SHORT, seed=0, system_prompt=None, store=store, models=models)
    finally:
        models.keep_only([])


def test_whatever_a_server_does_nothing_is_lost_and_nothing_doubled(tmp_path):
    tasks = [Task(f"t{number}", prompt, origin="A") for number, prompt in enumerate([*FAULTS, *"abcdefgh"])]
    store = Store.open(str(tmp_path))
    with serving(lambda asked: FAULTS.get(asked.prompt, echo(asked)) if asked.attempt == 1 else echo(asked)) as server:
        spec = spec_of(server, timeout_s=1.0)
        completions, work = run(store, spec, tasks)
        assert {prompt: len(server.attempts(prompt)) for prompt in FAULTS} == dict.fromkeys(FAULTS, 2)
        assert len(server.asked) == len(tasks) + len(FAULTS)
        again, reused = run(store, spec, tasks)
        assert len(server.asked) == len(tasks) + len(FAULTS)
    assert [completion.text for completion in completions] == [f"re: {task.prompt}" for task in tasks]
    assert [completion.invalid for completion in completions] == [None] * len(tasks)
    assert again == completions
    assert (work.computed, reused.computed) == (len(tasks), 0)
    rows = stored(store, "completions")
    assert len(rows) == len({row["key"] for row in rows}) == len(tasks)


def test_rating_asks_every_row_and_seed_once_and_goes_on_where_it_was_stopped(tmp_path):
    """Sampled and exact; with faults, answers that overtake each other, and a row that stops the first run."""
    asked_for = template("stated")
    completions = [Completion(Task(f"t{n}", f"Task {n}", origin="A"), "Done.") for n in range(1, 6)]
    blocked = Completion(Task("b", "Blocked", origin="A"), None, True, Invalid.blocked)

    def seed_of(completion: Completion, seed: int) -> int:
        turns = (*conversation(completion.task.prompt, completion.text), Message("user", asked_for.question))
        return row_seed(seed, turns)

    refused: list[int] = [seed_of(completions[3], 1)]

    def answer(asked: Asked) -> Say:
        if "logprobs" in asked.body:
            liked = asked.body["messages"][0]["content"][-1]
            top = {str(value): (0.6 if str(value) == liked else 0.05) for value in range(1, 6)}
            return Say(chat("1", logprobs=likeliest(("1", {**top, "The": 0.2}))))
        if asked.body["seed"] in refused:
            return error("no", 400)
        if asked.attempt == 1 and zlib.crc32(str(asked.body).encode()) % 3 == 0:
            return Say(b"{", after_s=0.01)
        return Say(chat(str(asked.body["seed"] % 5 + 1)), after_s=0.01 * (asked.body["seed"] % 7))

    store, models = Store.open(str(tmp_path)), Models()
    options: dict[str, Any] = {"seeds": (0, 1, 2), "exact": True, "capture": None, "system_prompt": None}

    def rated(spec: ModelSpec):
        everything = [*completions, blocked]
        return rate(everything, spec, {"a": asked_for}, SHORT, store=store, models=models, **options).ratings["a"]

    with serving(answer) as server:
        spec = spec_of(server, concurrency=8)
        with pytest.raises(UserError, match=r"rows of this batch were answered and are kept"):
            rated(spec)
        assert stored(store, "answers")
        refused.clear()
        ratings, count = rated(spec), len(server.asked)
        second = rated(spec)
        assert len(server.asked) == count
        good = [str(asked.body) for asked in server.asked if asked.attempt == 1]
        assert len(good) == len(set(good)) == 5 * (3 + 1)
        models.keep_only([])
    np.testing.assert_array_equal(ratings.mass, second.mass)
    assert ratings.mass is not None
    assert np.argmax(ratings.mass[:5], axis=1).tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(ratings.mass[:5].sum(axis=1), 0.8)
    for completion, answers in zip(completions, ratings.answers, strict=False):
        assert [one.value for one in answers] == [seed_of(completion, seed) % 5 + 1 for seed in (0, 1, 2)]
    assert {one.invalid for one in ratings.answers[5]} == {Invalid.blocked}
    for kind, number in (("answers", 15), ("scores", 5)):
        rows = stored(store, kind)
        assert len(rows) == len({row["key"] for row in rows}) == number


def test_nobody_is_sent_to_a_server_that_asks_for_a_rest():
    limited = Say({"error": "busy"}, status=429, headers={"Retry-After-Ms": "1500"})

    def answer(asked: Asked) -> Say:
        if asked.prompt == "limited":
            return limited if asked.attempt == 1 else echo(asked)
        return Say(echo(asked).body, after_s=0.7)

    with serving_engine(answer, concurrency=2) as (engine, server):
        texts(engine, "limited", "under way", "next")
    (turned_away, again), (following,) = server.attempts("limited"), server.attempts("next")
    assert min(again.when, following.when) - turned_away.when >= 1.5


ONE, OTHER = chat("the one")["choices"][0], chat("another")["choices"][0]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (chat(None, refusal="I can't help with that."), "I can't help with that."),
        ({**chat(""), "choices": [{**OTHER, "index": 1}, ONE, OTHER]}, "the one"),
        (chat(None), ""),
    ],
    ids=["a refusal", "further and repeated choices", "never any content"],
)
def test_the_text_of_an_answer_is_found_in_it(body, text):
    with serving_engine(lambda asked: Say(body), max_retries=1) as (engine, _):
        assert texts(engine, "p") == [text]


def test_a_server_at_its_limit_is_waited_for_while_others_get_through():
    """A row that is turned away more often than may be retried, while the rest of the batch goes on."""
    turned_away, rest = 6, 200

    def answer(asked: Asked) -> Say:
        if asked.prompt == "unlucky" and asked.attempt <= turned_away:
            # By the second request of the other worker, it has had an answer to its first.
            others = len(server.asked) - asked.attempt
            while len(server.asked) - asked.attempt < min(others + 2, rest):
                time.sleep(0.005)
            return error("slow down", 429)
        return echo(asked)

    with serving_engine(answer, concurrency=2, max_retries=2) as (engine, server):
        assert texts(engine, "unlucky", *(f"p{number}" for number in range(rest)))[0] == "re: unlucky"
    assert len(server.attempts("unlucky")) == turned_away + 1


def test_requests_under_way_are_finished_when_another_fails_and_none_is_begun():
    def answer(asked: Asked) -> Say:
        return error("no", 400, after_s=0.5) if asked.prompt == "p0" else Say(echo(asked).body, after_s=1.0)

    rows, done = to_complete(*(f"p{number}" for number in range(9))), {}
    line = r"400.*\(2 of 9 rows of this batch were answered and are kept\)$"
    with serving_engine(answer, concurrency=3) as (engine, server), pytest.raises(UserError, match=line):
        done.update((number, reply.samples[0].text) for number, reply in engine.run(rows))
    assert done == {1: "re: p1", 2: "re: p2"}
    assert sorted(server.prompts()) == ["p0", "p1", "p2"]
    assert server.most_at_once == 3


@pytest.mark.parametrize(
    ("reply", "tries", "line"),
    [
        (Say({"error": "a day"}, status=429, headers={"Retry-After": "7200"}), 1, "asks to wait 120 minutes .*a day"),
        (error("Your quota is used up", 429, code="insufficient_quota"), 1, "gives no more: Your quota is used up"),
        (Say(b"", status=503), 3, r"did not answer after 3 tries \(503 .*the same command again"),
    ],
)
def test_what_waiting_does_not_mend_is_left_to_the_user(reply, tries, line):
    with serving_engine(lambda asked: reply, max_retries=2) as (engine, server):
        with pytest.raises(UserError, match=line):
            texts(engine, "p")
        assert len(server.asked) == tries


def test_a_missing_key_is_named_before_anything_is_asked(monkeypatch):
    monkeypatch.delenv("PREFS_TEST_KEY")
    with serving(echo) as server:
        spec = spec_of(server)
        with pytest.raises(UserError, match=r"environment variable PREFS_TEST_KEY is not set"):
            OpenAIEngine.load(spec)
        monkeypatch.setenv("PREFS_TEST_KEY", "two words")
        with pytest.raises(UserError, match=r"PREFS_TEST_KEY holds is not a key"):
            OpenAIEngine.load(spec)
        assert server.asked == []


def test_the_key_goes_to_the_server_and_nowhere_else(prefs_log, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    prefs_log.set_level(logging.DEBUG)
    with serving_engine(echo) as (engine, server):
        texts(engine, "p")
        assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
        assert KEY not in repr(vars(engine)) + repr(vars(engine.spec)) + str(identity(engine.spec))
    assert KEY not in prefs_log.text
    with serving_engine(echo, key_env=None) as (engine, server):
        texts(engine, "p")
        assert "sk-of-another" not in str(server.asked[0].headers)


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500])
def test_a_key_that_a_server_repeats_is_not_passed_on(status, prefs_log):
    repeated = error(f"Incorrect API key provided: {KEY} (or sk-test-****cdef)", status)
    line = r"does not accept the key in PREFS_TEST_KEY \(401\)" if status == 401 else str(status)
    with (
        serving_engine(lambda asked: repeated, max_retries=1) as (engine, _),
        pytest.raises(UserError, match=line) as caught,
    ):
        texts(engine, "p", "q")
    assert "\n" not in str(caught.value)
    assert "cdef" not in str(caught.value) + prefs_log.text


def test_nobody_at_the_address():
    with serving(echo) as server:
        spec = spec_of(server)
    with pytest.raises(UserError, match=r"nobody answers at http://127.0.0.1:\d+/v1 \(.*model.api.base_url"):
        OpenAIEngine.load(spec)


def test_an_address_without_chat_completions():
    with serving(echo) as server:
        spec = dataclasses.replace(spec_of(server), api=ApiConfig(f"http://127.0.0.1:{server.port}", "PREFS_TEST_KEY"))
        engine = OpenAIEngine.load(spec)
        with pytest.raises(UserError, match=r"model.api.base_url: .* has no chat completions .*ends in /v1"):
            texts(engine, "p")
        engine.close()


def test_a_model_that_is_not_there_lists_what_is_close_ones_first(prefs_log):
    absent = error("The model `tinny` does not exist.", 404, code="model_not_found")
    listing = Say({"data": [{"id": name} for name in [*(f"model-{number}" for number in range(20)), "tiny"]]})
    with serving(lambda asked: absent, listing) as server:
        engine = OpenAIEngine.load(dataclasses.replace(spec_of(server), path="tinny"))
        with pytest.raises(UserError, match=r"model.path: 'tinny' is not on .* there is tiny, model-0, .* and 13 more"):
            texts(engine, "p")
        engine.close()
    assert "does not list tinny (there is tiny, " in prefs_log.text


TOO_LONG = {
    "OpenAI": error("This model's maximum context length is 8192 tokens.", code="context_length_exceeded"),
    "vLLM": error("This model's maximum context length is 2048 tokens. However, your prompt contains 3000", code=400),
    "OpenRouter": error("This endpoint's maximum context length is 4096 tokens. However, you requested 5000", code=400),
    "Anthropic": error("prompt is too long: 215000 tokens > 200000 maximum"),
    "llama.cpp": error("the request exceeds the available context size, try increasing it", code=400),
    "Gemini": error("The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)."),
    "a proxy": Say(b"<h1>413 Request Entity Too Large</h1>", status=413),
}
BLOCKED = {
    "Azure": error("The response was filtered due to Azure OpenAI's content management policy.", code="content_filter"),
    "OpenAI": error("Your prompt was flagged as potentially violating our usage policy.", code="invalid_prompt"),
    "OpenRouter": error("Your chosen model requires moderation and your input was flagged for violence", 403),
    "a filter on the answer": Say(chat("I", finish="content_filter")),
    "Gemini on the answer": Say(chat("", finish="SAFETY")),
    "a prohibited answer": Say(chat(None, finish="content_filter: PROHIBITED_CONTENT")),
}
NO_ANSWER = {
    "a tool call": Say(chat(None, finish="tool_calls")),
    "a reason nobody knows": Say(chat(" ", finish="OTHER")),
}


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (refusal, reason)
        for reason, refusals in (("too_long", TOO_LONG), ("blocked", BLOCKED), ("no_answer", NO_ANSWER))
        for refusal in refusals.values()
    ],
    ids=[*TOO_LONG, *BLOCKED, *NO_ANSWER],
)
def test_a_row_that_a_server_refuses_has_its_reason_and_the_others_are_answered(refusal, reason):
    with serving_engine(lambda asked: refusal if asked.prompt == "refused" else echo(asked)) as (engine, server):
        first, refused, third = samples(engine, "a", "refused", "c")
        assert len(server.asked) == 3
    assert refused == Sample(None, 0, True, invalid=reason)
    assert (first.text, third.text) == ("re: a", "re: c")


@pytest.mark.parametrize(
    ("body", "sample"),
    [
        (chat("", finish="MAX_TOKENS"), Sample("", 2, False)),
        (chat("Here", finish="tool_calls"), Sample("Here", 2, True)),
        (chat("Here", finish="length"), Sample("Here", 2, False)),
        (chat("", refusal="I won't."), Sample("I won't.", 2, True)),
    ],
)
def test_what_is_cut_off_or_has_a_text_is_an_answer(body, sample):
    with serving_engine(lambda asked: Say(body)) as (engine, _):
        assert samples(engine, "p") == [sample]


def test_thoughts_of_a_server_that_was_not_to_think_are_no_completions_and_are_told(tmp_path):
    """In the text, in a field of its own, and cut off."""
    bodies = {
        "a": chat("<think>\nI can't help with that? Easy.\n</think>\n\nHere."),
        "b": chat("Here.", reasoning_content="Easy."),
        "c": chat("<think>\nIs this", finish="length"),
        "d": chat("Here."),
        "e": chat(""),
    }

    def answer(asked: Asked) -> Say:
        question = len(asked.body["messages"]) > 1
        return Say(chat("<think>\nA 2 at first.\n</think>\n\n4") if question else bodies[asked.prompt])

    store, models = Store.open(str(tmp_path)), Models()
    with serving(answer) as server:
        spec = spec_of(server)
        completions, _ = run(store, spec, [Task(name, name, origin="A") for name in bodies])
        options: dict[str, Any] = {"seeds": (0,), "exact": False, "capture": None, "system_prompt": None}
        rated = rate(completions, spec, {"a": template("stated")}, SHORT, store=store, models=models, **options)
        models.keep_only([])
    ratings = rated.ratings["a"]
    assert [made.text for made in completions] == ["Here.", "Here.", None, "Here.", ""]
    assert [made.thought and made.thought.strip() for made in completions[:3]] == [
        "I can't help with that? Easy.", "Easy.", "Is this",
    ]  # fmt: skip
    assert completions[2].invalid is Invalid.thought_cut_off
    assert [row[0].value for row in ratings.answers] == [4, 4, None, 4, 4]
    config = SimpleNamespace(completer=SimpleNamespace(model=None))
    job = SimpleNamespace(roles=SimpleNamespace(completer=spec), config=config)
    cell = SimpleNamespace(ratings=ratings, job=job, config=config, measured=ratings.measured([None] * 5))
    remarks = " ".join(results.answers(cell).remarks)
    assert "3 of 5 completions came with a thought" in remarks
    assert "4 of 5 sampled answers came with a thought" in remarks
    assert "1 of 5 completions are empty" in remarks
    assert "1 task without a completion (the completer's thought did not end" in remarks


def test_an_answer_that_the_servers_context_cut_short_is_too_long():
    listing = Say({"data": [{"id": "tiny", "owned_by": "vllm", "max_model_len": 100}]})
    cut = {"prompt_tokens": 97, "completion_tokens": 3}
    with serving_engine(lambda asked: Say(chat("a b c", finish="length", usage=cut)), listing) as (engine, server):
        assert samples(engine, "p") == [Sample(None, 0, True, invalid="too_long")]
        # What it was asked for, and not what the model's own file says.
        assert (server.asked[0].body["top_k"], server.asked[0].body["repetition_penalty"]) == (-1, 1.0)
        (whole,) = samples(engine, "p", sampling=Sampling(1.0, 1.0, 3))
        assert (whole.text, whole.finished, whole.invalid) == ("a b c", False, None)


def test_what_is_asked_for():
    extra = {"provider": {"sort": "price"}}
    with serving_engine(echo, chat_template_kwargs={"enable_thinking": False}, extra_body=extra) as (engine, server):
        texts(engine, "p", "q", seed=7, sampling=Sampling(0.7, 0.9, 5))
    body = next(asked.body for asked in server.asked if asked.prompt == "p")
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "p"}],
        "max_tokens": 5,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": row_seed(7, conversation("p")),
        "provider": {"sort": "price"},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    # Rows do not share their random numbers.
    assert len({asked.body["seed"] for asked in server.asked}) == 2


def reasoning_model(asked: Asked) -> Say:
    """As OpenAI's reasoning models refuse."""
    if "max_tokens" in asked.body:
        line = "Unsupported parameter: 'max_tokens' is not supported here. Use 'max_completion_tokens' instead."
        return error(line, param="max_tokens", code="unsupported_parameter")
    if "temperature" in asked.body:
        line = "Unsupported value: 'temperature' does not support it with this model. Only the default (1) value."
        return error(line, param="temperature", code="unsupported_value")
    if "seed" in asked.body:
        return error("Unrecognized request argument supplied: seed", param=None)
    return echo(asked)


def test_parameters_that_a_server_refuses_are_left_out_once_and_for_all(prefs_log):
    with serving_engine(reasoning_model, concurrency=1) as (engine, server):
        assert texts(engine, "p", "q") == ["re: p", "re: q"]
        assert len(server.asked) == 5
        assert set(server.asked[-1].body) == {"model", "messages", "max_completion_tokens", "top_p"}
        with pytest.raises(UserError, match=r"does not take temperature=0.5 .*rating.temperature.* to 1"):
            texts(engine, "p", sampling=Sampling(0.5, 1.0, 5))
        # A judge's choice is not sampled, so that it judges all the same.
        replies(engine, to_choose("p"))
    assert prefs_log.text.count("takes no seed: its answers cannot be drawn again") == 1


def test_an_opening_is_given_for_the_server_to_go_on_with():
    with serving_engine(lambda asked: Say(chat("3")), prefill=True) as (engine, server):
        replies(engine, [OPENED])
        body = server.asked[0].body
    assert body["messages"][-1] == {"role": "assistant", "content": "Answer: "}
    assert (body["add_generation_prompt"], body["continue_final_message"]) == (False, True)


@pytest.mark.parametrize(
    ("changes", "wanted", "line"),
    [
        ({}, OPENED, r"template.prefill: got 'Answer: '.*api.prefill=true"),
        ({"prefill": True, "thinking": ThinkingConfig()}, OPENED, "thinks"),
        ({}, Request(conversation("p", "c"), capture=Capture((0,), ("rating",))), "capture=none"),
        ({"top_logprobs": 0}, SCORED, r"model.api.top_logprobs.*rating.exact=false"),
        ({"thinking": ThinkingConfig(force_close=True)}, SCORED, "force_close"),
    ],
    ids=["prefill", "prefill and thinking", "capture", "top_logprobs", "force_close"],
)
def test_what_a_server_does_not_do_is_one_line_before_anything_is_asked(changes, wanted, line):
    came: list[Asked] = []

    def answer(asked: Asked) -> Say:
        came.append(asked)
        return echo(asked)

    with pytest.raises(ConfigError, match=line), serving_engine(answer, **changes) as (engine, _):
        replies(engine, [wanted])
    assert came == []


def test_a_score_is_the_probability_of_each_options_token(prefs_log):
    # Some servers tell apart tokens that read the same; a blank before it changes nothing; what else there is is none.
    top = likeliest(("4", {"4": 0.5, "5": 0.25, "The": 0.125, " 4": 0.0625}))
    top["content"][0]["top_logprobs"].append({"token": "4", "logprob": float(np.log(0.03125))})
    with serving_engine(lambda asked: Say(chat("4", logprobs=top))) as (engine, server):
        (scored,) = scores(engine, "p")
        body = server.asked[0].body
    assert scored.mass == pytest.approx((0, 0, 0, 0.59375, 0.25))
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
    # At these, a server's probabilities are the model's whether it reports them before or after it applies them.
    assert (body["temperature"], body["top_p"]) == (1.0, 1.0)
    assert "3 of 5 option probabilities are not among the 20 likeliest tokens" in prefs_log.text


def test_options_of_several_tokens_are_gone_on_with():
    def answer(asked: Asked) -> Say:
        begun = asked.body["messages"][-1]["content"]
        top = {"Answer:": {" Strong": 0.5, " Agree": 0.25}, "Answer: Strong": {"ly": 1.0}}.get(begun)
        return Say(chat("x", logprobs=likeliest(("x", top or {" disagree": 0.75, " agree": 0.25}))))

    agreement = Question("Agree?", ("Strongly disagree", "Agree", "Strongly agree"), "Answer: ")
    with serving_engine(answer, prefill=True) as (engine, server):
        (scored,) = scores(engine, "p", question=agreement)
        assert len(server.asked) == 3
    assert scored.mass == pytest.approx((0.375, 0.25, 0.125))


def test_ten_is_told_from_one_where_a_row_shows_that_it_is_a_token():
    def answer(asked: Asked) -> Say:
        shown = {"1": 0.5, "10": 0.25} if asked.body["messages"][0]["content"] == "shows" else {"1": 0.5}
        return Say(chat("1", logprobs=likeliest(("1", shown))))

    with serving_engine(answer) as (engine, _):
        with pytest.raises(UserError, match=r"'1', '10' begin with the same token"):
            scores(engine, "hides", question=TO_TEN)
        hides, shows = scores(engine, "hides", "shows", question=TO_TEN)
        assert (hides.mass[1], hides.mass[10]) == pytest.approx((0.5, 0))
        assert (shows.mass[1], shows.mass[10]) == pytest.approx((0.5, 0.25))
        (later,) = scores(engine, "hides", question=TO_TEN)
        assert later == hides


ELSEWHERE = likeliest(("well", {"well": 0.5}), ("4", {"4": 0.5}))


@pytest.mark.parametrize(
    ("reply", "thinking", "line"),
    [
        (error("Requested sample logprobs of 20, which is greater than max allowed: 5"), None, NO_LOGPROBS),
        (error("logprobs are unsupported", param="logprobs", code="unsupported_parameter"), None, NO_LOGPROBS),
        (error("You are not allowed to request logprobs from this model", 403), None, NO_LOGPROBS),
        (Say(chat("4", logprobs={"content": None})), None, NO_LOGPROBS),
        (Say(chat("4", reasoning="well", logprobs=ELSEWHERE)), THINKS, r"not belong to the answer; use rating.exact=f"),
    ],
)
def test_log_probabilities_that_are_not_offered_are_one_clear_line(reply, thinking, line):
    with serving_engine(lambda asked: reply, thinking=thinking) as (engine, server):
        with pytest.raises(UserError, match=line):
            scores(engine, "p")
        assert len(server.asked) == 1


def in_the_text(text: str, *positions: tuple[str, dict[str, float]], finish: str = "stop") -> Say:
    return Say(chat(text, finish=finish, logprobs=likeliest(*positions)))


@pytest.mark.parametrize(
    "reply",
    [
        in_the_text("<think>4?</think>\n4", ("<think>", {}), ("4?", {}), ("</think>\n", {}), ("4", {"4": 0.5})),
        in_the_text("4?</think>4", ("4?", {"4?": 1.0}), ("</", {}), ("think>", {}), ("4", {"4": 0.5})),
        Say(chat("\n4", reasoning_content="4?", logprobs=likeliest(("\n", {}), ("4", {"4": 0.5})))),
        Say(chat("4", reasoning="4?", logprobs=likeliest(("4?", {}), ("</think>", {}), ("4", {"4": 0.5})))),
    ],
    ids=["in the text", "without its mark", "apart", "apart, but in the log-probabilities"],
)
def test_a_thought_is_taken_apart_and_scored_after(reply):
    with serving_engine(lambda asked: reply, thinking=THINKS) as (engine, server):
        (rated,) = replies(engine, to_rate("p", seeds=(0, 1), scores=(0,)))
        # The sample and the score of a seed come from one request.
        assert len(server.asked) == 2
        assert {asked.body["max_tokens"] for asked in server.asked} == {105}
        assert sorted("logprobs" in asked.body for asked in server.asked) == [False, True]
    assert rated.scores == {0: Score(pytest.approx((0, 0, 0, 0.5, 0)), "4?")}
    assert [(sample.text, sample.thought) for sample in rated.samples.values()] == [("4", "4?")] * 2


HIDDEN = {"prompt_tokens": 5, "completion_tokens": 60, "completion_tokens_details": {"reasoning_tokens": 50}}


@pytest.mark.parametrize(
    ("reply", "thinking", "thought"),
    [
        (in_the_text("<think>4 or", ("<think>", {}), ("4", {"4": 0.5}), finish="length"), THINKS, "4 or"),
        (in_the_text("4 or", ("4", {"4": 0.5}), finish="length"), THINKS, "4 or"),
        (Say(chat(None, finish="length", reasoning="4 or", logprobs=likeliest(("4", {"4": 0.5})))), THINKS, "4 or"),
        # Nobody said that it thinks, and the room for the answer went into a thought that it keeps to itself.
        (Say(chat("", finish="length", usage=HIDDEN, logprobs=likeliest(("4", {"4": 0.5})))), None, None),
    ],
    ids=["in the text", "without its mark", "apart", "hidden"],
)
def test_a_thought_that_was_cut_off_gives_no_answer(reply, thinking, thought):
    with serving_engine(lambda asked: reply, thinking=thinking) as (engine, _):
        (rated,) = replies(engine, to_rate("p", seeds=(0,), scores=(0,) if thinking else ()))
    cut = Sample(None, rated.samples[0].tokens, False, invalid="thought_cut_off", thought=thought)
    assert rated.samples == {0: cut}
    assert rated.scores == ({0: Score(None, thought, invalid="thought_cut_off")} if thinking else {})


def test_a_choice_is_one_of_the_options_or_none():
    answers = ('{"answer": "refusal"}', " Compliance.\n", "It depends.", '{"answer": 3}', "null")
    with serving_engine(lambda asked: Say(chat(asked.prompt))) as (engine, server):
        choices = [reply.choice for reply in replies(engine, to_choose(*answers))]
        schema = server.asked[0].body["response_format"]["json_schema"]["schema"]
    assert choices == ["refusal", "compliance", None, None, None]
    assert schema["properties"]["answer"]["enum"] == ["refusal", "compliance"]
    assert server.asked[0].body["temperature"] == 0


def test_a_server_without_structured_output_is_asked_plainly(prefs_log):
    def answer(asked: Asked) -> Say:
        if "response_format" in asked.body:
            return error("This response_format type is unavailable now")
        return TOO_LONG["vLLM"] if asked.prompt == "long" else Say(chat("refusal"))

    with serving_engine(answer, concurrency=1) as (engine, server):
        assert [reply.choice for reply in replies(engine, to_choose("p", "long"))] == ["refusal", None]
        assert len(server.asked) == 3
    assert prefs_log.text.count("offers no structured output") == 1


def test_usage_counts_every_request_and_prices_its_tokens():
    def answer(asked: Asked) -> Say:
        if asked.attempt == 1:
            return Say(b"", status=500)
        return Say(chat("x", usage={"prompt_tokens": 1000, "completion_tokens": 100, "cost": 0.25}))

    with serving_engine(answer) as (engine, _):
        texts(engine, "p", "q")
        used = engine.usage()
        assert (used.requests, used.prompt_tokens, used.completion_tokens, used.dollars) == (4, 2000, 200, 0.5)
    with serving_engine(answer, price_prompt=3.0, price_completion=15.0) as (engine, _):
        texts(engine, "p")
        assert engine.usage().dollars == pytest.approx(1000 * 3e-6 + 100 * 15e-6)
    with serving_engine(echo) as (engine, _):
        texts(engine, "p")
        assert engine.usage().dollars is None


def test_conversations_with_control_tokens_in_them_are_counted_in_one_warning(tmp_path, prefs_log):
    prompts = ["plain", "a <|im_end|> b", "<start_of_turn>", "[INST] x", "<|eot_id|>", "</think>", "a < b | c > d [1]"]
    tasks = [Task(f"t{number}", prompt, origin="A") for number, prompt in enumerate(prompts)]
    with serving(echo) as server:
        run(Store.open(str(tmp_path)), dataclasses.replace(spec_of(server), batch_tokens=2), tasks)
    warnings = [record.message for record in prefs_log.records if "control token" in record.message]
    assert len(warnings) == 1
    assert warnings[0].startswith("5 conversations")


def test_an_interrupt_from_the_keyboard_stops_at_once():
    with serving(lambda asked: Say(hang=True)) as server:
        script = f"""
            from prefs.config import ApiConfig
            from prefs.models.loading import ModelSpec
            from prefs.models.openai.engine import OpenAIEngine
            from prefs.models.types import Message, Request, Sampling
            spec = ModelSpec("t", "t", "openai", dtype="served", api=ApiConfig({server.base_url!r}, None))
            request = Request((Message("user", "p"),), sampling=Sampling(1.0, 1.0, 5), seeds=(0, 1, 2))
            list(OpenAIEngine.load(spec).run([request]))
        """
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.PIPE, text=True)
        try:
            while len(server.asked) < 3:
                assert child.poll() is None, child.communicate()[1]
                time.sleep(0.05)
            child.send_signal(signal.SIGINT)
            _, complaint = child.communicate(timeout=60)
        finally:
            child.kill()
    assert "KeyboardInterrupt" in complaint
    assert child.returncode != 0
