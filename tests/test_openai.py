"""The engine for OpenAI-compatible servers against one that fails in every way a test can think of."""

from __future__ import annotations

import dataclasses
import email.utils
import io
import logging
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from conftest import template
from fault_server import Asked, FaultServer, Say, chat, error, likeliest, serving

from prefs.config import ApiConfig, ModelConfig
from prefs.data.task import Task
from prefs.data.template import Invalid
from prefs.errors import ConfigError, UserError
from prefs.models.loading import Models, ModelSpec, identity
from prefs.models.openai import server as served
from prefs.models.openai.engine import OpenAIBackend
from prefs.models.openai.refusals import asked_wait
from prefs.models.sampling import row_seed
from prefs.models.tokens import Message, Thinking
from prefs.models.types import Ask, CaptureRequest, Interrupted, Question, Sample, Sampling, Score
from prefs.stages.complete import complete
from prefs.stages.rate import rate
from prefs.stages.records import Completion
from prefs.store.table import Store

KEY = "key_0123456789abcdef"
SHORT = Sampling(1.0, 1.0, 5)
SCALE = Question("How much, from 1 to 5?", ("1", "2", "3", "4", "5"))


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
def engine(answer, models: Say | None = None, **changes) -> Iterator[tuple[OpenAIBackend, FaultServer]]:
    with serving(answer, models) as server:
        backend = OpenAIBackend.load(spec_of(server, **changes))
        try:
            yield backend, server
        finally:
            backend.close()


def after(prompt: str, completion: str | None = None) -> tuple[Message, ...]:
    turns = (Message("user", prompt),)
    return turns if completion is None else (*turns, Message("assistant", completion))


def echo(asked: Asked) -> Say:
    return Say(chat(f"re: {asked.prompt}"))


def texts(samples: list[Sample]) -> list[str | None]:
    return [sample.text for sample in samples]


# One fault a prompt, once; then the answer.
FAULTS = {
    "limited": error("slow down", 429, code="rate_limit_exceeded"),
    "limited with a time": Say({"error": "slow"}, status=429, headers={"Retry-After-Ms": "50"}),
    "broken": Say(b"<html><h1>Internal Server Error</h1></html>", status=500),
    "bad gateway": Say(b"", status=502),
    "conflict": error("locked", 409),
    "drips": Say(chat("too late as well"), drip=True),
    "hangs": Say(chat("too late"), hang=True),
    "cut off": Say(chat("an answer that is cut off in the middle"), cut_off=True),
    "not JSON": Say(b'{"choices": [{"message": '),
    "text": Say(b"upstream busy", headers={"Content-Type": "text/plain"}),
    "a list": Say([1, 2]),
    "null": Say(None),
    "no choices": Say({**chat("x"), "choices": []}),
    "choices that are a number": Say({**chat("x"), "choices": 3}),
    "no message": Say({**chat("x"), "choices": [{"index": 0}]}),
    "no content": Say(chat(None)),
    "content that is a number": Say(chat(3)),  # type: ignore[arg-type]
    "an error in a 200": Say({"error": {"message": "provider returned error", "code": 502}}),
    "an error in a choice": Say(chat("half an ans", finish="error")),
}


def once_faulty(asked: Asked) -> Say:
    if asked.prompt in FAULTS and asked.attempt == 1:
        return FAULTS[asked.prompt]
    return echo(asked)


def stored(store: Store, kind: str) -> list[dict]:
    return [row for part in sorted((store.root / kind).rglob("*.parquet")) for row in pq.read_table(part).to_pylist()]


def run(store: Store, spec: ModelSpec, tasks: list[Task]):
    models = Models()
    try:
        return complete(tasks, spec, SHORT, seed=0, system_prompt=None, store=store, models=models)
    finally:
        models.keep_only([])


def test_whatever_a_server_does_nothing_is_lost_and_nothing_doubled(tmp_path):
    tasks = [Task(f"t{at}", prompt, origin="A") for at, prompt in enumerate([*FAULTS, *"abcdefgh"])]
    store = Store.open(str(tmp_path))
    with serving(once_faulty) as server:
        spec = spec_of(server, timeout_s=1.0)
        completions, work = run(store, spec, tasks)
        assert {prompt: len(server.attempts(prompt)) for prompt in FAULTS} == dict.fromkeys(FAULTS, 2)
        assert len(server.asked) == len(tasks) + len(FAULTS)
        again, reused = run(store, spec, tasks)
        assert len(server.asked) == len(tasks) + len(FAULTS)
    assert [each.text for each in completions] == [f"re: {task.prompt}" for task in tasks]
    assert [each.invalid for each in completions] == [None] * len(tasks)
    assert again == completions
    assert (work.computed, reused.computed) == (len(tasks), 0)
    rows = stored(store, "completions")
    assert len(rows) == len({row["key"] for row in rows}) == len(tasks)


def test_every_row_and_seed_is_asked_once_and_read_in_its_place(tmp_path):
    """Ratings through the stage, sampled and exact, with faults on the way and answers that overtake each other."""

    def answer(asked: Asked) -> Say:
        if asked.attempt == 1 and zlib.crc32(str(asked.body).encode()) % 3 == 0:
            return Say(b"{", after_s=0.01)
        if "logprobs" in asked.body:
            liked = asked.body["messages"][0]["content"][-1]
            top = {str(value): (0.6 if str(value) == liked else 0.05) for value in range(1, 6)}
            return Say(chat("1", logprobs=likeliest(("1", {**top, "The": 0.2}))))
        return Say(chat(str(asked.body["seed"] % 5 + 1)), after_s=0.01 * (asked.body["seed"] % 7))

    completions = [Completion(Task(f"t{n}", f"Task {n}", origin="A"), "Done.") for n in range(1, 6)]
    store, models, asked_for = Store.open(str(tmp_path)), Models(), template("stated")
    options = {"seeds": (0, 1, 2), "exact": True, "capture": None, "system_prompt": None}
    with serving(answer) as server:
        spec = spec_of(server, concurrency=8)
        rated = rate(completions, spec, {"a": asked_for}, SHORT, store=store, models=models, **options)
        assert len([each for each in server.asked if each.attempt == 1]) == 5 * (3 + 1)
        assert len(server.asked) > 5 * (3 + 1)
        count = len(server.asked)
        second = rate(completions, spec, {"a": asked_for}, SHORT, store=store, models=models, **options)
        assert len(server.asked) == count
        models.keep_only([])
    ratings = rated.ratings["a"]
    assert ratings.mass is not None
    assert np.argmax(ratings.mass, axis=1).tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(ratings.mass.sum(axis=1), 0.8)
    np.testing.assert_array_equal(ratings.mass, second.ratings["a"].mass)
    for each, answers in zip(completions, ratings.answers, strict=True):
        turns = (*after(each.task.prompt, each.text), Message("user", asked_for.question))
        assert [one.value for one in answers] == [row_seed(seed, turns) % 5 + 1 for seed in (0, 1, 2)]
    for kind, count in (("answers", 15), ("scores", 5)):
        rows = stored(store, kind)
        assert len(rows) == len({row["key"] for row in rows}) == count


def test_answers_that_overtake_each_other_stay_with_their_rows():
    prompts = [f"p{at}" for at in range(6)]
    with engine(lambda asked: Say(echo(asked).body, after_s=0.3 - 0.05 * int(asked.prompt[1])), concurrency=6) as made:
        backend, _ = made
        samples = backend.complete([after(prompt) for prompt in prompts], 0, SHORT)
    assert texts(samples) == [f"re: {prompt}" for prompt in prompts]


def test_repeated_and_further_choices_are_left_aside():
    body = chat("the one")
    other = {**body["choices"][0], "message": {"role": "assistant", "content": "another"}}
    shuffled = {**body, "choices": [{**other, "index": 1}, body["choices"][0], other, {**other, "index": 2}]}
    with engine(lambda asked: Say(shuffled)) as (backend, server):
        assert texts(backend.complete([after("p")], 0, SHORT)) == ["the one"]
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("status", "headers", "least"),
    [(429, {"Retry-After": "1"}, 1.0), (429, {"Retry-After-Ms": "300"}, 0.3), (500, {"Retry-After-Ms": "300"}, 0.3)],
)
def test_a_request_is_not_sent_again_before_the_server_says(status, headers, least):
    def answer(asked: Asked) -> Say:
        return Say({"error": "busy"}, status=status, headers=headers) if asked.attempt == 1 else echo(asked)

    with engine(answer, concurrency=3) as (backend, server):
        prompts = [f"p{at}" for at in range(6)]
        assert texts(backend.complete([after(prompt) for prompt in prompts], 0, SHORT)) == [
            f"re: {prompt}" for prompt in prompts
        ]
        for prompt in prompts:
            first, second = server.attempts(prompt)
            assert second.at - first.at >= least


def test_nobody_is_sent_to_a_server_that_asks_for_a_rest():
    limited = Say({"error": "busy"}, status=429, headers={"Retry-After-Ms": "1500"})

    def answer(asked: Asked) -> Say:
        if asked.prompt == "limited":
            return limited if asked.attempt == 1 else echo(asked)
        return Say(echo(asked).body, after_s=0.7)

    with engine(answer, concurrency=2) as (backend, server):
        backend.complete([after(prompt) for prompt in ("limited", "under way", "next")], 0, SHORT)
    (turned_away, _), (following,) = server.attempts("limited"), server.attempts("next")
    assert following.at - turned_away.at >= 1.5


def test_waits_are_read_from_seconds_milliseconds_and_dates(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)
    date = email.utils.formatdate(1_800_000_030, usegmt=True)
    assert asked_wait({"retry-after": "7"}) == 7
    assert asked_wait({"retry-after": "7", "retry-after-ms": "1500"}) == 1.5
    assert asked_wait({"retry-after": date}) == 30
    for nothing in ({}, {"retry-after": "0"}, {"retry-after": "-3"}, {"retry-after": "nan"}, {"retry-after": "soon"}):
        assert asked_wait(nothing) is None
    assert asked_wait({"retry-after": email.utils.formatdate(1_799_999_000, usegmt=True)}) is None


def test_no_more_requests_at_once_than_allowed_and_no_fewer():
    with engine(lambda asked: Say(echo(asked).body, after_s=0.3), concurrency=3) as (backend, server):
        backend.complete([after(f"p{at}") for at in range(9)], 0, SHORT)
    assert server.most_at_once == 3


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

    with engine(answer, concurrency=2, max_retries=2) as (backend, server):
        samples = backend.complete([after("unlucky"), *(after(f"p{at}") for at in range(rest))], 0, SHORT)
    assert samples[0].text == "re: unlucky"
    assert len(server.attempts("unlucky")) == turned_away + 1


def test_what_was_answered_before_a_server_broke_is_kept_and_not_asked_again(tmp_path):
    broken = True

    def answer(asked: Asked) -> Say:
        if broken and asked.prompt in ("c", "d"):
            return Say(b"", status=503)
        return echo(asked)

    tasks = [Task(prompt, prompt, origin="A") for prompt in "abcdef"]
    store = Store.open(str(tmp_path))
    with serving(answer) as server:
        spec = spec_of(server, concurrency=1, max_retries=2)
        with pytest.raises(Interrupted, match=r"did not answer after 3 tries \(503 .*the same command again"):
            run(store, spec, tasks)
        before = set(server.prompts())
        assert "f" not in before or "e" not in before or len(before) < 6
        kept = {row["text"] for row in stored(store, "completions")}
        assert kept == {f"re: {prompt}" for prompt in before - {"c", "d"}}
        assert kept
        broken = False
        server.asked.clear()
        completions, work = run(store, spec, tasks)
        assert sorted(server.prompts()) == sorted(set("abcdef") - {text[-1] for text in kept})
    assert [each.text for each in completions] == [f"re: {task.prompt}" for task in tasks]
    assert work.reused == len(kept)


def test_requests_under_way_are_finished_when_another_fails_and_none_is_begun():
    def answer(asked: Asked) -> Say:
        if asked.prompt == "p0":
            return error("no", 400)
        return Say(echo(asked).body, after_s=1.0)

    with engine(answer, concurrency=3) as (backend, server), pytest.raises(Interrupted, match=r"400.*no") as stopped:
        backend.complete([after(f"p{at}") for at in range(9)], 0, SHORT)
    assert [sample.text if sample else None for sample in stopped.value.done] == [
        None,
        "re: p1",
        "re: p2",
        *[None] * 6,
    ]
    assert sorted(server.prompts()) == ["p0", "p1", "p2"]


def test_a_row_half_answered_keeps_its_half():
    """Seeds that were answered are worth keeping, even where another seed of the row was not."""
    asked_for = Ask(SCALE, seeds=(0, 1, 2), scores=())
    refused = row_seed(1, (*after("p", "c"), Message("user", SCALE.text)))

    def answer(asked: Asked) -> Say:
        return error("no", 400) if asked.body["seed"] == refused else Say(chat("3"))

    with engine(answer, concurrency=1) as (backend, _), pytest.raises(Interrupted) as stopped:
        backend.observe([after("p", "c"), after("q", "c")], [asked_for], SHORT)
    half, nothing = stopped.value.done
    assert half is not None
    assert {seed: one.text for seed, one in half.answers[0].samples.items()} == {0: "3"}
    assert nothing is None


def test_a_long_wait_is_left_to_the_user():
    with engine(lambda asked: Say({"error": "daily limit"}, status=429, headers={"Retry-After": "7200"})) as (
        backend,
        server,
    ):
        with pytest.raises(UserError, match=r"asks to wait 120 minutes .*daily limit"):
            backend.complete([after("p")], 0, SHORT)
        assert len(server.asked) == 1


def test_a_spent_quota_is_no_rate_limit():
    quota = error("You exceeded your current quota", 429, code="insufficient_quota")
    with engine(lambda asked: quota) as (backend, server):
        with pytest.raises(UserError, match=r"gives no more: You exceeded your current quota"):
            backend.complete([after("p")], 0, SHORT)
        assert len(server.asked) == 1


def test_a_message_that_never_has_content_is_an_empty_answer():
    with engine(lambda asked: Say(chat(None)), max_retries=2) as (backend, server):
        assert texts(backend.complete([after("p")], 0, SHORT)) == [""]
        assert len(server.asked) == 3


# Keys


def test_a_missing_key_is_named_before_anything_is_asked(monkeypatch):
    monkeypatch.delenv("PREFS_TEST_KEY")
    with serving(echo) as server:
        spec = spec_of(server)
        with pytest.raises(UserError, match=r"environment variable PREFS_TEST_KEY is not set"):
            OpenAIBackend.load(spec)
        config = ModelConfig(name="tiny", path="tiny", backend="openai", api=spec.api)
        with pytest.raises(UserError, match=r"PREFS_TEST_KEY"):
            ModelSpec.from_config(config)
        monkeypatch.setenv("PREFS_TEST_KEY", "two words")
        with pytest.raises(UserError, match=r"PREFS_TEST_KEY holds is not a key"):
            OpenAIBackend.load(spec)
        assert server.asked == []


def test_the_key_goes_to_the_server_and_nowhere_else(prefs_log, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    prefs_log.set_level(logging.DEBUG)
    with engine(echo) as (backend, server):
        backend.complete([after("p")], 0, SHORT)
        assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
        assert KEY not in repr(vars(backend)) + repr(vars(backend.spec)) + str(identity(backend.spec))
    assert KEY not in prefs_log.text
    with engine(echo, key_env=None) as (backend, server):
        backend.complete([after("p")], 0, SHORT)
        assert "sk-of-another" not in str(server.asked[0].headers)


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500])
def test_a_key_that_a_server_repeats_is_not_passed_on(status, prefs_log):
    said = f"Incorrect API key provided: {KEY} (or sk-test-****cdef)"
    with engine(lambda asked: error(said, status), max_retries=1) as (backend, _), pytest.raises(UserError) as refused:
        backend.complete([after("p")], 0, SHORT)
    line = str(refused.value)
    assert str(status) in line
    assert "\n" not in line
    assert "cdef" not in line + prefs_log.text


def test_a_wrong_key_is_one_line_that_names_the_variable():
    with engine(lambda asked: error("Incorrect API key provided", 401)) as (backend, server):
        with pytest.raises(UserError, match=r"does not accept the key in PREFS_TEST_KEY \(401\)"):
            backend.complete([after("p"), after("q")], 0, SHORT)
        assert len(server.asked) <= 4


# Addresses and models


def test_nobody_at_the_address():
    with serving(echo) as server:
        spec = spec_of(server)
    with pytest.raises(UserError, match=r"nobody answers at http://127.0.0.1:\d+/v1 \(.*model.api.base_url"):
        OpenAIBackend.load(spec)


def test_an_address_without_chat_completions():
    with serving(echo) as server:
        spec = dataclasses.replace(spec_of(server), api=ApiConfig(f"http://127.0.0.1:{server.port}", "PREFS_TEST_KEY"))
        backend = OpenAIBackend.load(spec)
        with pytest.raises(UserError, match=r"model.api.base_url: .* has no chat completions .*ends in /v1"):
            backend.complete([after("p")], 0, SHORT)
        backend.close()


def test_a_model_that_is_not_there_lists_what_is_close_ones_first(prefs_log):
    absent = error("The model `tinny` does not exist.", 404, code="model_not_found")
    names = [f"model-{at}" for at in range(20)] + ["tiny"]
    listing = Say({"data": [{"id": name} for name in names]})
    with serving(lambda asked: absent, listing) as server:
        backend = OpenAIBackend.load(dataclasses.replace(spec_of(server), path="tinny"))
        with pytest.raises(UserError, match=r"model.path: 'tinny' is not on .* there is tiny, model-0, .* and 13 more"):
            backend.complete([after("p")], 0, SHORT)
        backend.close()
    assert "does not list tinny (there is tiny, " in prefs_log.text


def test_a_model_that_is_not_listed_but_answers_is_used():
    with engine(echo, Say({"data": [{"id": "else"}]})) as (backend, _):
        assert texts(backend.complete([after("p")], 0, SHORT)) == ["re: p"]


@pytest.mark.parametrize(
    "listing",
    [Say(b"<html>", status=200), Say([{"id": "tiny"}]), Say({"data": "x"}), Say(b"", status=401), Say(b"", status=500)],
)
def test_a_list_of_models_that_cannot_be_read_is_no_matter(listing):
    with engine(echo, listing) as (backend, _):
        assert texts(backend.complete([after("p")], 0, SHORT)) == ["re: p"]


# Rows that a server will not answer

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
}


@pytest.mark.parametrize(
    ("says", "reason"),
    [(says, Invalid.too_long) for says in TOO_LONG.values()] + [(says, Invalid.blocked) for says in BLOCKED.values()],
    ids=[*TOO_LONG, *BLOCKED],
)
def test_a_row_that_a_server_refuses_is_counted_by_reason_and_the_others_are_answered(tmp_path, says, reason):
    tasks = [Task(prompt, prompt, origin="A") for prompt in ("a", "refused", "c")]
    store = Store.open(str(tmp_path))
    with serving(lambda asked: says if asked.prompt == "refused" else echo(asked)) as server:
        completions, _ = run(store, spec_of(server), tasks)
        again, work = run(store, spec_of(server), tasks)
        assert len(server.asked) == 3
    assert [each.invalid for each in completions] == [None, reason, None]
    assert [each.text for each in completions] == ["re: a", None, "re: c"]
    assert (again, work.computed) == (completions, 0)


@pytest.mark.parametrize("thinking", [None, Thinking()])
def test_a_question_that_a_server_refuses_has_its_reason_at_every_seed(thinking):
    def answer(asked: Asked) -> Say:
        if asked.body["messages"][0]["content"] == "long":
            return TOO_LONG["OpenAI"]
        return Say(chat("</think>3", logprobs=likeliest(("</think>", {"</think>": 0.9}), ("3", {"3": 0.9}))))

    each = Ask(SCALE, seeds=(0, 1), scores=(0, 1) if thinking else (0,))
    with engine(answer, thinking=thinking) as (backend, _):
        short, long = backend.observe([after("p", "c"), after("long", "c")], [each], SHORT)
    assert long.answers[0].samples == dict.fromkeys((0, 1), Sample(None, 0, True, invalid="too_long"))
    assert long.answers[0].scores == dict.fromkeys(each.scores, Score(None, invalid="too_long"))
    assert all(score.invalid is None for score in short.answers[0].scores.values())


def test_an_answer_that_the_servers_context_cut_short_is_too_long():
    listing = Say({"data": [{"id": "tiny", "owned_by": "vllm", "max_model_len": 100}]})
    cut = {"prompt_tokens": 97, "completion_tokens": 3}
    with engine(lambda asked: Say(chat("a b c", finish="length", usage=cut)), listing) as (backend, server):
        assert backend.complete([after("p")], 0, SHORT) == [Sample(None, 0, True, invalid="too_long")]
        # What it was asked for, and not what the model's own file says.
        assert (server.asked[0].body["top_k"], server.asked[0].body["repetition_penalty"]) == (-1, 1.0)
        (whole,) = backend.complete([after("p")], 0, Sampling(1.0, 1.0, 3))
        assert (whole.text, whole.finished, whole.invalid) == ("a b c", False, None)


# Parameters


def test_what_is_asked_for():
    with engine(
        echo, chat_template_kwargs='{"enable_thinking": false}', extra_body={"provider": {"sort": "price"}}
    ) as (
        backend,
        server,
    ):
        backend.complete([after("p"), after("q")], 7, Sampling(0.7, 0.9, 5))
    body = next(each.body for each in server.asked if each.prompt == "p")
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "p"}],
        "max_tokens": 5,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": row_seed(7, after("p")),
        "provider": {"sort": "price"},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    # Rows do not share their random numbers.
    assert len({each.body["seed"] for each in server.asked}) == 2


def reasoning_model(asked: Asked) -> Say:
    """As OpenAI's reasoning models refuse."""
    if "max_tokens" in asked.body:
        said = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
        return error(said, param="max_tokens", code="unsupported_parameter")
    if "temperature" in asked.body:
        said = "Unsupported value: 'temperature' does not support it with this model. Only the default (1) value."
        return error(said, param="temperature", code="unsupported_value")
    if "seed" in asked.body:
        return error("Unrecognized request argument supplied: seed", param=None)
    return echo(asked)


def test_parameters_that_a_server_refuses_are_left_out_once_and_for_all(prefs_log):
    with engine(reasoning_model, concurrency=1) as (backend, server):
        assert texts(backend.complete([after("p"), after("q")], 0, SHORT)) == ["re: p", "re: q"]
        assert len(server.asked) == 5
        assert set(server.asked[-1].body) == {"model", "messages", "max_completion_tokens", "top_p"}
        with pytest.raises(UserError, match=r"does not take temperature=0.5 .*rating.temperature.* to 1"):
            backend.complete([after("p")], 0, Sampling(0.5, 1.0, 5))
    assert prefs_log.text.count("takes no seed: its answers cannot be drawn again") == 1


def test_a_temperature_that_a_server_refuses_is_not_quietly_another():
    with (
        engine(reasoning_model) as (backend, _),
        pytest.raises(UserError, match=r"does not take temperature=0.5 \(.*Only the default"),
    ):
        backend.complete([after("p")], 0, Sampling(0.5, 1.0, 5))


def test_many_requests_that_find_out_at_once():
    with engine(lambda asked: Say(**{**vars(reasoning_model(asked)), "after_s": 0.05}), concurrency=8) as (backend, _):
        prompts = [f"p{at}" for at in range(16)]
        assert texts(backend.complete([after(prompt) for prompt in prompts], 0, SHORT)) == [f"re: {p}" for p in prompts]


def test_an_opening_is_given_only_to_servers_that_go_on_with_it():
    question = dataclasses.replace(SCALE, prefill="Answer: ")
    with engine(echo) as (backend, server):
        with pytest.raises(ConfigError, match=r"template.prefill: got 'Answer: '.*api.prefill=true"):
            backend.observe([after("p", "c")], [Ask(question, (0,), ())], SHORT)
        assert server.asked == []
    with engine(lambda asked: Say(chat("3")), prefill=True) as (backend, server):
        backend.observe([after("p", "c")], [Ask(question, (0,), ())], SHORT)
        body = server.asked[0].body
        assert body["messages"][-1] == {"role": "assistant", "content": "Answer: "}
        assert (body["add_generation_prompt"], body["continue_final_message"]) == (False, True)
    with engine(echo, prefill=True, thinking=Thinking()) as (backend, _), pytest.raises(ConfigError, match=r"thinks"):
        backend.observe([after("p", "c")], [Ask(question, (0,), ())], SHORT)


def test_a_served_model_shows_no_residuals():
    with engine(echo) as (backend, _), pytest.raises(ConfigError, match=r"capture=none"):
        backend.observe([after("p", "c")], [], SHORT, CaptureRequest((0,), ("rating",)))


# Exact scores


def score(backend: OpenAIBackend, *questions: Question, rows=("p",)) -> list[list[Score]]:
    seen = backend.observe([after(row, "c") for row in rows], [Ask(question) for question in questions], SHORT)
    return [[answer.scores[0] for answer in row.answers] for row in seen]


def test_a_score_is_the_probability_of_each_options_token(prefs_log):
    # Some servers tell apart tokens that read the same; what else there is does not count.
    top = likeliest(("4", {"4": 0.5, "5": 0.25, "The": 0.125, " 4": 0.0625}))
    top["content"][0]["top_logprobs"].append({"token": "4", "logprob": float(np.log(0.03125))})
    with engine(lambda asked: Say(chat("4", logprobs=top))) as (backend, server):
        ((scored,),) = score(backend, SCALE)
        body = server.asked[0].body
    assert scored.mass == pytest.approx((0, 0, 0, 0.53125, 0.25))
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
    # At these, a server's probabilities are the model's whether it reports them before or after it applies them.
    assert (body["temperature"], body["top_p"]) == (1.0, 1.0)
    assert "3 of 5 option probabilities are not among the 20 likeliest tokens" in prefs_log.text


def test_options_that_begin_with_one_token_need_a_server_that_goes_on():
    agreement = Question("Agree?", ("Strongly disagree", "Disagree", "Agree", "Strongly agree"))
    top = likeliest(("Strong", {"Strong": 0.7, "Agree": 0.2}))
    with (
        engine(lambda asked: Say(chat("Strong", logprobs=top))) as (backend, _),
        pytest.raises(UserError, match=r"'Strongly disagree', 'Strongly agree' begin with the same token"),
    ):
        score(backend, agreement)


def test_ten_is_told_from_one_where_a_row_shows_that_it_is_a_token():
    scale = Question("0 to 10?", tuple(str(value) for value in range(11)))

    def answer(asked: Asked) -> Say:
        first = asked.body["messages"][0]["content"]
        return Say(chat("1", logprobs=likeliest(("1", {"1": 0.5, "10": 0.25} if first == "shows" else {"1": 0.5}))))

    with engine(answer) as (backend, _):
        with pytest.raises(UserError, match=r"'1', '10' begin with the same token"):
            score(backend, scale, rows=("hides",))
        (hides,), (shows,) = score(backend, scale, rows=("hides", "shows"))
        assert (hides.mass[1], hides.mass[10]) == pytest.approx((0.5, 0))
        assert (shows.mass[1], shows.mass[10]) == pytest.approx((0.5, 0.25))
        ((later,),) = score(backend, scale, rows=("hides",))
        assert later == hides


def test_a_batch_that_was_stopped_early_blames_what_stopped_it():
    """And not the tokens that it has not shown yet."""
    scale = Question("0 to 10?", tuple(str(value) for value in range(11)))

    def answer(asked: Asked) -> Say:
        if asked.body["messages"][0]["content"] == "second":
            return error("Incorrect API key provided", 401)
        return Say(chat("1", logprobs=likeliest(("1", {"1": 0.5}))))

    with engine(answer, concurrency=1) as (backend, _), pytest.raises(UserError, match="401"):
        score(backend, scale, rows=("first", "second"))


def test_samples_are_kept_where_scores_turn_out_to_be_impossible():
    agreement = Question("Agree?", ("Strongly disagree", "Strongly agree"))
    top = likeliest(("Strong", {"Strong": 0.7}))
    with (
        engine(lambda asked: Say(chat("Strongly agree", logprobs=top))) as (backend, _),
        pytest.raises(Interrupted) as stopped,
    ):
        backend.observe([after("p", "c")], [Ask(agreement, (0,))], SHORT)
    (row,) = stopped.value.done
    assert row is not None
    assert row.answers[0].samples[0].text == "Strongly agree"
    assert row.answers[0].scores == {}


@pytest.mark.parametrize(
    "says",
    [
        error("Requested sample logprobs of 20, which is greater than max allowed: 5"),
        error("logprobs are not supported with reasoning models.", param="logprobs", code="unsupported_parameter"),
        error("You are not allowed to request logprobs from this model", 403),
        Say(chat("4")),
        Say(chat("4", logprobs={"content": None})),
    ],
)
def test_log_probabilities_that_are_not_offered_are_one_clear_line(says):
    with engine(lambda asked: says) as (backend, server):
        with pytest.raises(UserError, match=r"gives no log-probabilities of tiny .*rating.exact=false"):
            score(backend, SCALE)
        assert len(server.asked) == 1


def test_no_likeliest_tokens_no_exact_ratings():
    with engine(echo, top_logprobs=0) as (backend, server):
        with pytest.raises(ConfigError, match=r"model.api.top_logprobs.*rating.exact=false"):
            score(backend, SCALE)
        assert server.asked == []


@pytest.mark.parametrize(
    "broken",
    [
        {"content": [{"token": 3}]},
        {"content": [{"token": "4", "top_logprobs": [{"token": "4", "logprob": "high"}]}]},
        {"content": "none"},
    ],
)
def test_log_probabilities_that_are_none_are_asked_for_again(broken):
    good = likeliest(("4", {"4": 0.5}))
    with engine(lambda asked: Say(chat("4", logprobs=broken if asked.attempt == 1 else good))) as (backend, server):
        ((scored,),) = score(backend, SCALE)
        assert scored.mass == pytest.approx((0, 0, 0, 0.5, 0))
        assert len(server.asked) == 2


# Thinking

THINKS = Thinking(max_tokens=100)


def in_the_text(text: str, *positions: tuple[str, dict[str, float]], finish: str = "stop") -> Say:
    return Say(chat(text, finish=finish, logprobs=likeliest(*positions)))


@pytest.mark.parametrize(
    "says",
    [
        in_the_text(
            "<think>4?</think>\n\n4", ("<think>", {}), ("4?", {}), ("</think>", {}), ("\n\n", {}), ("4", {"4": 0.5})
        ),
        in_the_text("4?</think>4", ("4?", {"4?": 1.0}), ("</", {}), ("think>", {}), ("4", {"4": 0.5})),
        Say(chat("\n4", reasoning_content="4?", logprobs=likeliest(("\n", {}), ("4", {"4": 0.5})))),
        Say(chat("4", reasoning="4?", logprobs=likeliest(("4?", {}), ("</think>", {}), ("4", {"4": 0.5})))),
    ],
    ids=["in the text", "without its mark", "apart", "apart, but in the log-probabilities"],
)
def test_a_thought_is_taken_apart_and_scored_after(says):
    with engine(lambda asked: says, thinking=THINKS) as (backend, server):
        (seen,) = backend.observe([after("p", "c")], [Ask(SCALE, (0, 1), (0,))], SHORT)
        # The sample and the score of a seed come from one request.
        assert len(server.asked) == 2
        assert {each.body["max_tokens"] for each in server.asked} == {105}
        assert sorted("logprobs" in each.body for each in server.asked) == [False, True]
    (answer,) = seen.answers
    assert answer.scores == {0: Score(pytest.approx((0, 0, 0, 0.5, 0)), "4?")}
    assert {(sample.text, sample.thought) for sample in answer.samples.values()} == {("4", "4?")}


@pytest.mark.parametrize(
    "says",
    [
        in_the_text("<think>well, 4 or", ("<think>", {}), ("4", {"4": 0.5}), finish="length"),
        in_the_text("well, 4 or", ("well", {}), ("4", {"4": 0.5}), finish="length"),
        Say(chat(None, finish="length", reasoning="well, 4 or", logprobs=likeliest(("4", {"4": 0.5})))),
        Say(chat("", finish="length", reasoning_content="well, 4 or", logprobs=likeliest(("4", {"4": 0.5})))),
    ],
)
def test_a_thought_that_was_cut_off_gives_no_answer(says):
    with engine(lambda asked: says, thinking=THINKS) as (backend, server):
        (seen,) = backend.observe([after("p", "c")], [Ask(SCALE, (0,), (0,))], SHORT)
        assert len(server.asked) == 1
    (answer,) = seen.answers
    sample, scored = answer.samples[0], answer.scores[0]
    assert (sample.text, sample.invalid, sample.finished) == (None, "thought_cut_off", False)
    assert (scored.mass, scored.invalid) == (None, "thought_cut_off")
    assert sample.thought == scored.thought
    assert sample.thought is not None
    assert "4 or" in sample.thought


def test_a_thought_is_stored_with_its_completion(tmp_path):
    store = Store.open(str(tmp_path))
    with serving(lambda asked: Say(chat("<think>well</think>Done."))) as server:
        (done,), _ = run(store, spec_of(server, thinking=THINKS), [Task("t", "p", origin="A")])
    assert done.text == "Done."
    (row,) = stored(store, "completions")
    assert (row["text"], row["thought"], row["invalid"]) == ("Done.", "well", None)


def test_completions_stored_before_there_were_thoughts_are_read(tmp_path):
    store, tasks = Store.open(str(tmp_path)), [Task("t", "p", origin="A")]
    with serving(echo) as server:
        spec = spec_of(server)
        first, _ = run(store, spec, tasks)
        (part,) = (store.root / "completions").rglob("*.parquet")
        older = io.BytesIO()
        pq.write_table(pq.read_table(part).drop_columns(["thought"]), older)
        part.unlink()
        (part.parent / f"{xxhash.xxh3_128_hexdigest(older.getvalue())}.parquet").write_bytes(older.getvalue())
        again, work = run(store, spec, tasks)
        assert len(server.asked) == 1
    assert (again, work.reused) == (first, 1)


def test_a_thought_that_a_server_keeps_to_itself():
    hidden = {"prompt_tokens": 5, "completion_tokens": 60, "completion_tokens_details": {"reasoning_tokens": 50}}
    with engine(lambda asked: Say(chat("4", usage=hidden)), thinking=THINKS) as (backend, _):
        (sample,) = backend.complete([after("p")], 0, SHORT)
        assert (sample.text, sample.thought, sample.invalid) == ("4", None, None)
    # Nobody said that it thinks, and the room for the answer went into the thought.
    with engine(lambda asked: Say(chat("", finish="length", usage=hidden))) as (backend, _):
        (sample,) = backend.complete([after("p")], 0, SHORT)
        assert (sample.text, sample.invalid) == (None, "thought_cut_off")


def test_log_probabilities_that_do_not_belong_to_the_answer():
    says = Say(chat("4", reasoning="well", logprobs=likeliest(("well", {"well": 0.5}), ("4", {"4": 0.5}))))
    with (
        engine(lambda asked: says, thinking=THINKS) as (backend, _),
        pytest.raises(UserError, match=r"do not belong to the answer; use rating.exact=false"),
    ):
        backend.observe([after("p", "c")], [Ask(SCALE, (), (0,))], SHORT)


def test_a_server_ends_its_models_thoughts():
    with serving(echo) as server, pytest.raises(ConfigError, match=r"force_close"):
        OpenAIBackend.load(spec_of(server, thinking=Thinking(force_close=True)))


def test_a_refusal_field_is_what_was_said():
    with engine(lambda asked: Say(chat(None, refusal="I can't help with that."))) as (backend, _):
        assert texts(backend.complete([after("p")], 0, SHORT)) == ["I can't help with that."]


# Choosing

VERDICT = ("refusal", "compliance")


def test_a_choice_is_one_of_the_options_or_none(prefs_log):
    says = {
        "json": '{"answer": "refusal"}',
        "plain": " Compliance.\n",
        "other": "It depends.",
        "odd": '{"answer": 3}',
        "null": "null",
    }
    with engine(lambda asked: Say(chat(says[asked.body["messages"][0]["content"]]))) as (backend, server):
        chosen = backend.choose([after(each) for each in says], VERDICT)
        schema = server.asked[0].body["response_format"]["json_schema"]["schema"]
    assert chosen == ["refusal", "compliance", None, None, None]
    assert schema["properties"]["answer"]["enum"] == ["refusal", "compliance"]
    assert server.asked[0].body["temperature"] == 0


def test_a_server_without_structured_output_is_asked_plainly(prefs_log):
    def answer(asked: Asked) -> Say:
        if "response_format" in asked.body:
            return error("This response_format type is unavailable now")
        return TOO_LONG["vLLM"] if asked.body["messages"][0]["content"] == "long" else Say(chat("refusal"))

    with engine(answer, concurrency=1) as (backend, server):
        assert backend.choose([after("p"), after("long")], VERDICT) == ["refusal", None]
        assert len(server.asked) == 3
    assert prefs_log.text.count("offers no structured output") == 1


def test_choices_made_before_a_server_broke_are_kept():
    def answer(asked: Asked) -> Say:
        return Say(b"", status=500) if asked.prompt == "second" else Say(chat('{"answer": "refusal"}'))

    with engine(answer, concurrency=1, max_retries=1) as (backend, _), pytest.raises(Interrupted) as stopped:
        backend.choose([after("first"), after("second"), after("third")], VERDICT)
    assert stopped.value.done == ["refusal", None, None]


def test_a_judge_that_takes_no_temperature_judges_all_the_same():
    with engine(reasoning_model) as (backend, server):
        backend.choose([after("p")], VERDICT)
        assert "temperature" not in server.asked[-1].body


# What it costs, and what may go wrong with text


def test_usage_counts_every_request_and_prices_its_tokens():
    def answer(asked: Asked) -> Say:
        if asked.attempt == 1:
            return Say(b"", status=500)
        return Say(chat("x", usage={"prompt_tokens": 1000, "completion_tokens": 100, "cost": 0.25}))

    with engine(answer) as (backend, _):
        backend.complete([after("p"), after("q")], 0, SHORT)
        used = backend.usage()
        assert (used.requests, used.prompt_tokens, used.completion_tokens, used.dollars) == (4, 2000, 200, 0.5)
    with engine(answer, price_prompt=3.0, price_completion=15.0) as (backend, _):
        backend.complete([after("p")], 0, SHORT)
        assert backend.usage().dollars == pytest.approx(1000 * 3e-6 + 100 * 15e-6)
    with engine(echo) as (backend, _):
        backend.complete([after("p")], 0, SHORT)
        assert backend.usage().dollars is None


def test_conversations_with_control_tokens_in_them_are_counted_in_one_warning(tmp_path, prefs_log):
    tasks = [
        Task(f"t{at}", text, origin="A")
        for at, text in enumerate(
            ["plain", "a <|im_end|> b", "<start_of_turn>", "[INST] x", "<|eot_id|>", "</think>", "a < b | c > d [1]"]
        )
    ]
    with serving(echo) as server:
        run(Store.open(str(tmp_path)), dataclasses.replace(spec_of(server), batch_tokens=2), tasks)
    warnings = [record.message for record in prefs_log.records if "control token" in record.message]
    assert len(warnings) == 1
    assert warnings[0].startswith("5 conversations")


def test_an_interrupt_from_the_keyboard_stops_at_once(tmp_path):
    with serving(lambda asked: Say(hang=True)) as server:
        script = f"""
            from prefs.models.tokens import Message
            from prefs.config import ApiConfig
            from prefs.models.types import Sampling
            from prefs.models.loading import ModelSpec
            from prefs.models.openai.engine import OpenAIBackend
            spec = ModelSpec("t", "t", "openai", dtype="served", api=ApiConfig({server.base_url!r}, None))
            OpenAIBackend.load(spec).complete([(Message("user", "p"),)] * 3, 0, Sampling(1.0, 1.0, 5))
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


def test_an_empty_batch():
    with engine(echo) as (backend, server):
        assert backend.complete([], 0, SHORT) == []
        assert backend.observe([], [Ask(SCALE)], SHORT) == []
        assert backend.choose([], VERDICT) == []
        assert server.asked == []


def test_rating_goes_on_where_it_was_stopped_and_asks_for_nothing_twice(tmp_path):
    stop = True
    done = [Completion(Task(f"t{n}", f"Task {n}", origin="A"), "Done.") for n in range(6)]
    done.append(Completion(Task("b", "Blocked", origin="A"), None, True, Invalid.blocked))
    asked_for = template("stated")

    def turns(n):
        return (*after(f"Task {n}", "Done."), Message("user", asked_for.question))

    bad = row_seed(1, turns(2))

    def answer(asked):
        if stop and asked.body["seed"] == bad and "logprobs" not in asked.body:
            return error("no", 400)
        if "logprobs" in asked.body:
            return Say(chat("1", logprobs=likeliest(("1", {"1": 0.6, "2": 0.2}))))
        return Say(chat(str(asked.body["seed"] % 5 + 1)))

    store, models = Store.open(str(tmp_path)), Models()
    options = {"seeds": (0, 1, 2), "exact": True, "capture": None, "system_prompt": None}
    with serving(answer) as server:
        spec = spec_of(server, concurrency=2)
        with pytest.raises(Interrupted):
            rate(done, spec, {"a": asked_for}, SHORT, store=store, models=models, **options)
        first = len(server.asked)
        stop = False
        rated = rate(done, spec, {"a": asked_for}, SHORT, store=store, models=models, **options)
        bodies = [str(sorted(each.body.items(), key=str)) for each in server.asked]
        assert first > 3
        assert len(server.asked) == 6 * 4 + 1, (first, len(server.asked))
        assert sorted(bodies.count(b) for b in set(bodies))[-2:] == [1, 2]
        models.keep_only([])
    ratings = rated.ratings["a"]
    assert [one.value for one in ratings.answers[2]] == [row_seed(s, turns(2)) % 5 + 1 for s in range(3)]
    assert {one.invalid for one in ratings.answers[6]} == {Invalid.blocked}
    for kind, count in (("answers", 18), ("scores", 6)):
        rows = stored(store, kind)
        assert len(rows) == len({row["key"] for row in rows}) == count
